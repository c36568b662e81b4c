"""What every attention shares: ESPnet's call, positions, masks and the softmax kernel.

Shape letters: B batch, H heads, G key/value heads, Q queries, S keys, T frames, D model size,
d_k head size.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_kv.cache import FrameState, State, StateSpec
from espnet_kv.errors import ConfigError
from espnet_kv.position import Chunks, rel_shift
from espnet_kv.step import Memory, Step

# Long utterances are attended in blocks of queries: of the 2T-1 relative positions each block
# meets only T+block-1, and under a chunk mask only the keys in reach are touched.
QUERY_BLOCK = 256


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of an attention layer, checked on construction.

    Raises:
        ConfigError (a ValueError): the model size is not a multiple of the heads.
    """

    n_head: int
    n_feat: int

    def __post_init__(self) -> None:
        if self.n_head < 1 or self.n_feat % self.n_head:
            raise ConfigError(
                f"attention_heads: {self.n_head} does not divide output_size {self.n_feat}"
            )

    @property
    def d_k(self) -> int:
        return self.n_feat // self.n_head


class Attention(nn.Module):
    """Base of the attention modules that ESPnet's encoder blocks can hold.

    Called as ESPnet calls its own: `forward(query, key, value, pos_emb, mask)` with relative
    positions, `forward(query, key, value, mask)` without. A chunked encoder puts `Chunks` in the
    place of pos_emb in both cases, a streaming one a `Step`.

    Args:
        sizes: heads and model size.
        dropout_rate: dropout on the attention weights.
        rel_pos: relative positions (ESPnet's "latest" rel_selfattn) or none (selfattn).
    """

    # keyword arguments that a user may set in attention_conf
    options: tuple[str, ...] = ()
    # options of ESPnet's own attention modules that this one honours too
    espnet_options: tuple[str, ...] = ()
    # which of a Step's states is this module's; given by the encoder that holds it
    state_index: int

    def __init__(self, sizes: HeadSizes, dropout_rate: float, rel_pos: bool):
        super().__init__()
        self.h, self.d_k = sizes.n_head, sizes.d_k
        self.dropout_rate = dropout_rate
        self.rel_pos = rel_pos

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *context) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, D).
            key, value: (B, S, D).
            context: pos_emb (1, 2T-1, D), Chunks or Step, where there is one, then the mask:
                (B, 1, S) or (B, Q, S), nonzero where a key may be seen, or None. A Step says
                itself what may be seen.

        Returns:
            (B, Q, D).
        """
        position, mask = context if len(context) == 2 else (None, *context)
        if isinstance(position, Step):
            return self.step(query, position)
        if isinstance(mask, Step):  # the slot that reaches a decoder's attention
            return self.step(query, mask)
        if isinstance(mask, Memory):
            return self.recall(query, mask)
        if isinstance(position, Chunks):
            return self.attend(query, key, value, position.pos_emb, mask, position)
        return self.attend(query, key, value, position, mask, None)

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pos_emb: Tensor | None,
        mask: Tensor | None,
        chunks: Chunks | None,
    ) -> Tensor:
        """What `forward` says, with its context taken apart."""

    @abstractmethod
    def init_state(self, spec: StateSpec) -> State:
        """An empty state of this module."""

    @abstractmethod
    def step(self, x: Tensor, step: Step) -> Tensor:
        """Self-attention of a chunk (R, Q, D) over itself and what is stored -> (R, Q, D)."""

    @abstractmethod
    def remember(self, memory: Tensor, spec: StateSpec, mask: Tensor | None) -> State:
        """What cross-attention keeps of an encoded utterance.

        Args:
            memory: (B, T, D).
            spec: with T slots.
            mask: (B, 1, T), nonzero where there is a frame, or None: everywhere.
        """

    @abstractmethod
    def recall(self, x: Tensor, memory: Memory) -> Tensor:
        """Cross-attention of (B, Q, D) over what `remember` kept -> (B, Q, D)."""


class SoftmaxAttention(Attention):
    """Scaled dot-product attention over keys and values that a subclass projects.

    Parameters carry the names of ESPnet's MultiHeadedAttention and
    RelPositionMultiHeadedAttention: linear_q, linear_out, linear_pos, pos_bias_u, pos_bias_v.

    Args:
        sizes, dropout_rate, rel_pos: see Attention.
        zero_triu: drop the position term of keys ahead of the query (ESPnet's option).
    """

    espnet_options: tuple[str, ...] = ("zero_triu",)

    def __init__(
        self, sizes: HeadSizes, dropout_rate: float, rel_pos: bool, zero_triu: bool = False
    ):
        super().__init__(sizes, dropout_rate, rel_pos)
        self.zero_triu = zero_triu
        self.linear_q = nn.Linear(sizes.n_feat, sizes.n_feat)
        self.linear_out = nn.Linear(sizes.n_feat, sizes.n_feat)
        if rel_pos:
            self.linear_pos = nn.Linear(sizes.n_feat, sizes.n_feat, bias=False)
            self.pos_bias_u = nn.Parameter(torch.empty(self.h, self.d_k))
            self.pos_bias_v = nn.Parameter(torch.empty(self.h, self.d_k))
            nn.init.xavier_uniform_(self.pos_bias_u)
            nn.init.xavier_uniform_(self.pos_bias_v)
            self._table: tuple[tuple, Tensor] | None = None

    @abstractmethod
    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, S, D) -> (B, G, S, d_k), G a divisor of the heads."""

    @abstractmethod
    def init_state(self, spec: StateSpec) -> FrameState:
        """An empty state of this module."""

    def project_q(self, query: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, H, d_k)."""
        return self.linear_q(query).view(*query.shape[:2], self.h, self.d_k)

    def attend(self, query, key, value, pos_emb, mask, chunks):
        q = self.project_q(query)  # (B, Q, H, d_k)
        k, v = self.project_kv(key, value)  # (B, G, S, d_k)
        frames = k.size(2)
        if pos_emb is None:
            content, position, p = q.transpose(1, 2), None, q
        else:
            content = (q + self.pos_bias_u).transpose(1, 2)  # (B, H, Q, d_k)
            position = (q + self.pos_bias_v).transpose(1, 2)
            p = self.linear_pos(pos_emb).view(pos_emb.size(0), -1, self.h, self.d_k)
            p = p.permute(0, 2, 3, 1)  # (1, H, d_k, 2T-1)

        outputs = []
        for first in range(0, content.size(2), QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, content.size(2))
            start, stop = chunks.key_range(first, last, frames) if chunks else (0, frames)
            visible = _visible(mask, chunks, first, last, start, stop, k.device)
            bias = visible
            if position is not None:
                # (B, H, q, d_k) x (1, H, d_k, q+s-1) -> (B, H, q, q+s-1) -> (B, H, q, s)
                window = p[..., frames - last + start : frames - 1 - first + stop]
                scores = torch.matmul(position[:, :, first:last], window)
                bias = self._position_bias(rel_shift(scores, stop - start), visible, first - start)
            outputs.append(
                grouped_attention(
                    content[:, :, first:last],
                    k[:, :, start:stop],
                    v[:, :, start:stop],
                    bias,
                    self.dropout_rate if self.training else 0.0,
                )
            )
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return self.linear_out(out.transpose(1, 2).flatten(2))

    def step(self, x, step):
        stored = step.states[self.state_index].append(step, *self.to_store(x))
        q = self.project_q(x)  # (R, Q, H, d_k)
        if step.pos_emb is None:
            return self._mix(q, stored, step.visible)
        keys, (r, queries) = step.read, x.shape[:2]
        # streams as further queries: the table is read once for all of them
        position = (q + self.pos_bias_v).permute(2, 0, 1, 3).flatten(1, 2)  # (H, R Q, d_k)
        first = step.slots - keys
        window = self._position_table(step)[:, first : first + keys + queries - 1]
        # (H, R Q, d_k) x (H, d_k, S+Q-1) -> (H, R Q, S+Q-1) -> (R, H, Q, S)
        scores = torch.bmm(position, window.transpose(1, 2)).unflatten(1, (r, queries))
        bias = rel_shift(scores.transpose(0, 1), keys)
        if self.zero_triu:
            bias = bias.tril(keys - queries)
        bias = step.arrange(bias)
        if step.visible is not None:
            bias = bias.masked_fill(~step.visible, torch.finfo(bias.dtype).min)
        return self._mix(q + self.pos_bias_u, stored, bias)

    def remember(self, memory, spec, mask):
        state = self.init_state(spec)
        state.append(Step.whole(memory), *self.to_store(memory))
        return state

    def recall(self, x, memory):
        stored = memory.states[self.state_index].read(memory.whole, x.dtype)
        return self._mix(self.project_q(x), stored, memory.visible)

    def _mix(self, q: Tensor, stored: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """`attend_stored` of q (B, Q, H, d_k), projected to (B, Q, D)."""
        out = self.attend_stored(q.transpose(1, 2), stored, bias)
        return self.linear_out(out.transpose(1, 2).flatten(2))

    def to_store(self, x: Tensor) -> tuple[Tensor, ...]:
        """The vectors that are stored of frames (B, S, D): each (B, G, S, its size)."""
        return self.project_kv(x, x)

    def attend_stored(self, q: Tensor, stored: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Attend to frames of which the vectors of `to_store` were kept.

        Args:
            q: (B, H, Q, d_k).
            stored: each (B, G, S, its size).
            bias: broadcastable to (B, H, Q, S): bool (True: visible) or added to the logits.

        Returns:
            (B, H, Q, d_k).
        """
        k, v = stored
        return grouped_attention(q, k, v, bias, 0.0)

    def _position_table(self, step: Step) -> Tensor:
        """(H, N+C-1, d_k): relative positions as linear_pos sees them, over sqrt(d_k).

        They are the same for every chunk and stream; projecting them anew each time would cost
        as much as a feed-forward layer.
        """
        assert step.pos_emb is not None
        weight = self.linear_pos.weight
        version = None if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, step.slots, step.chunk_size, weight.dtype, weight.device)
        if self._table is None or self._table[0] != key:
            p = self.linear_pos(step.pos_emb[0] / math.sqrt(self.d_k))
            self._table = (key, p.view(-1, self.h, self.d_k).transpose(0, 1).contiguous())
        return self._table[1]

    def _position_bias(self, scores: Tensor, visible: Tensor | None, diagonal: int) -> Tensor:
        """Additive mask of the kernel: scaled position term, hidden keys at the minimum."""
        bias = scores / math.sqrt(self.d_k)
        if self.zero_triu:
            bias = bias.tril(diagonal)
        if visible is not None:
            # in place: the division above made a tensor of our own
            bias.masked_fill_(~visible, torch.finfo(bias.dtype).min)
        return bias


def _visible(
    mask: Tensor | None,
    chunks: Chunks | None,
    first: int,
    last: int,
    start: int,
    stop: int,
    device: torch.device,
) -> Tensor | None:
    """(B or 1, 1, q or 1, s) bool for queries [first, last) and keys [start, stop), or None."""
    visible = None
    if mask is not None:
        rows = mask if mask.size(1) == 1 else mask[:, first:last]
        visible = rows[:, None, :, start:stop] != 0
    if chunks is not None:
        queries = torch.arange(first, last, device=device)
        keys = torch.arange(start, stop, device=device)
        in_reach = chunks.visible(queries, keys)
        visible = in_reach[None, None] if visible is None else visible & in_reach
        # a padded frame out of reach of any real one would softmax over nothing: let it see itself
        visible = visible | (queries[:, None] == keys[None, :])
    return visible


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dropout: float,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention in which H query heads share G key/value heads.

    Args:
        q: (B, H, Q, d_k).
        k, v: (B, G, S, d_k), G dividing H.
        bias: broadcastable to (B, H, Q, S): bool (True: visible) or added to the logits.
        dropout: probability of dropping an attention weight.
        scale: of the logits; None: 1 / sqrt(d_k).

    Returns:
        (B, H, Q, d_k).
    """
    groups, heads = k.size(1), q.size(1)
    if groups == heads:
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
    # heads of one group become further queries of that group: K and V are read once, not copied
    b, _, queries, d_k = q.shape
    share = heads // groups
    q = q.reshape(b, groups, share * queries, d_k)
    if bias is not None and max(bias.shape[1:3]) > 1:  # a padding mask broadcasts as it is
        bias = bias.expand(-1, heads, queries, -1)
        bias = bias.reshape(bias.size(0), groups, share * queries, -1)
    out = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
    return out.reshape(b, heads, queries, d_k)
