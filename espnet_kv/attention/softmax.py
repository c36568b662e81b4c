"""Softmax attention: the kernel, relative positions and masks.

Shape letters beyond those of `base`: G key/value heads, N slots, C chunk_size.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_kv.attention.base import Attention, HeadSizes
from espnet_kv.attention.chunks import Chunks
from espnet_kv.cache.state import FrameState, StateSpec

# Long utterances are processed in blocks of queries. Of the 2T-1 relative positions a block needs
# only T+block-1, and under a chunk mask only the visible range of keys.
QUERY_BLOCK = 256


class SoftmaxAttention(Attention):
    """Scaled dot-product attention over keys and values that a subclass projects.

    Parameters carry the names of ESPnet's MultiHeadedAttention and
    RelPositionMultiHeadedAttention: linear_q, linear_out, linear_pos, pos_bias_u, pos_bias_v.

    Args:
        sizes, dropout_rate, rel_pos: see Attention.
        zero_triu: set the position term of keys after the query to zero (ESPnet's option).
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

    @abstractmethod
    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, S, D) -> (B, G, S, d_k), G a divisor of the heads."""

    def init_state(self, spec: StateSpec) -> FrameState:
        return FrameState(spec, self.cached_vector_sizes)

    @property
    @abstractmethod
    def cached_vector_sizes(self) -> list[tuple[int, int]]:
        """(G, size) of each vector of `cached_vectors`."""

    def project_q(self, query: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, H, d_k)."""
        return self.linear_q(query).view(*query.shape[:2], self.h, self.d_k)

    def attend(self, query, key, value, mask, chunks):
        q = self.project_q(query)  # (B, Q, H, d_k)
        k, v = self.project_kv(key, value)  # (B, G, S, d_k)
        frames, pos_emb = k.size(2), chunks.pos_emb
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
            start, stop = chunks.key_range(first, last, frames) if chunks.size else (0, frames)
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
        stored = step.states[self.state_index].append(step, *self.cached_vectors(x))
        q = self.project_q(x)  # (R, Q, H, d_k)
        table = step.tables[self.state_index] if step.tables else None
        if table is None:
            return self._attend(q, stored, step.visible)
        keys, (r, queries) = step.read, x.shape[:2]
        # streams become additional queries, so that the table is read once
        position = (q + self.pos_bias_v).permute(2, 0, 1, 3).flatten(1, 2)  # (H, R Q, d_k)
        # (H, R Q, d_k) x (H, d_k, S+Q-1) -> (H, R Q, S+Q-1) -> (R, H, Q, S)
        scores = torch.bmm(position, table[:, step.window].transpose(1, 2))
        bias = rel_shift(scores.unflatten(1, (r, queries)).transpose(0, 1), keys)
        if self.zero_triu:
            bias = bias.tril(keys - queries)
        bias = step.hide(step.to_slot_order(bias))
        return self._attend(q + self.pos_bias_u, stored, bias)

    def init_cross_state(self, memory, spec, mask):
        state = self.init_state(spec)
        vectors = iter(state.tensors)
        for codec, x in zip(state.codecs, self.cached_vectors(memory), strict=True):
            for encoded in codec.encode(x):
                next(vectors).copy_(encoded)
        return state

    def cross_attend(self, x, step):
        stored = step.memory.states[self.state_index].read(step.memory, x.dtype)
        return self._attend(self.project_q(x), stored, step.memory.visible)

    def _attend(self, q: Tensor, stored: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """`attend_cached` of q (B, Q, H, d_k), projected to (B, Q, D)."""
        out = self.attend_cached(q.transpose(1, 2), stored, bias)
        return self.linear_out(out.transpose(1, 2).flatten(2))

    def cached_vectors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Vectors to store for frames (B, S, D): each (B, G, S, size)."""
        return self.project_kv(x, x)

    def attend_cached(self, q: Tensor, stored: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Attend to cached frames.

        Args:
            q: (B, H, Q, d_k).
            stored: the vectors of `cached_vectors`, each (B, G, S, size).
            bias: broadcastable to (B, H, Q, S): bool (True: visible) or added to the logits.

        Returns:
            (B, H, Q, d_k).
        """
        k, v = stored
        return grouped_attention(q, k, v, bias, 0.0)

    def position_table(self, pos_emb: Tensor) -> Tensor | None:
        """(1, N+C-1, D) -> (H, N+C-1, d_k), divided by sqrt(d_k).

        The result is the same for all chunks and streams. Projecting the positions in each chunk
        would cost as much as a feed-forward layer.
        """
        if not self.rel_pos:
            return None
        # the table is used after the current autocast region has ended
        with torch.autocast(pos_emb.device.type, enabled=False):
            p = self.linear_pos(pos_emb[0].to(self.pos_bias_u.dtype) / math.sqrt(self.d_k))
        return p.view(-1, self.h, self.d_k).transpose(0, 1).contiguous()

    def _position_bias(self, scores: Tensor, visible: Tensor | None, diagonal: int) -> Tensor:
        """Additive mask: the scaled position term, with the minimum for keys not visible."""
        bias = scores / math.sqrt(self.d_k)
        if self.zero_triu:
            bias = bias.tril(diagonal)
        if visible is not None:
            # in place is safe: the division above made a new tensor
            bias.masked_fill_(~visible, torch.finfo(bias.dtype).min)
        return bias


def rel_shift(scores: Tensor, keys: int) -> Tensor:
    """Align relative-position scores with keys, without copying.

    The queries are the last Q of `keys` frames. The position axis runs from the largest distance
    to the smallest, as in ESPnet's RelPositionalEncoding, so the score of query i and key j is at
    position Q - 1 - i + j (Transformer-XL, arXiv 1901.02860, appendix B). In the flattened last
    two dimensions that is Q - 1 + i (S + Q - 2) + j.

    Args:
        scores: (B, H, Q, S+Q-1), contiguous in its last two dimensions.
        keys: S.

    Returns:
        (B, H, Q, S), a view of `scores`.
    """
    queries, width = scores.shape[2:]
    if queries == 1:
        return scores[..., :keys]
    flat = scores.flatten(2)[..., queries - 1 : queries * width - 1]
    return flat.unflatten(2, (queries, width - 1))[..., :keys]


def _visible(
    mask: Tensor | None,
    chunks: Chunks,
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
    if chunks.size:
        queries = torch.arange(first, last, device=device)
        keys = torch.arange(start, stop, device=device)
        in_chunks = chunks.visible(queries, keys)
        visible = in_chunks[None, None] if visible is None else visible & in_chunks
        # a padded frame may have no visible key, and its softmax no term: make it visible to itself
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
    """Scaled dot-product attention of H query heads that share G key/value heads.

    Args:
        q: (B, H, Q, d_k).
        k, v: (B, G, S, d_k), G dividing H.
        bias: broadcastable to (B, H, Q, S): bool (True: visible) or added to the logits.
        dropout: probability of dropping an attention weight.
        scale: factor of the logits; None: 1 / sqrt(d_k).

    Returns:
        (B, H, Q, d_k).
    """
    groups, heads = k.size(1), q.size(1)
    if groups == heads:
        return _attention(q, k, v, bias, dropout, scale)
    # heads of one group become additional queries of that group, so that K and V are not copied
    b, _, queries, d_k = q.shape
    share = heads // groups
    q = q.reshape(b, groups, share * queries, d_k)
    if bias is not None and max(bias.shape[1:3]) > 1:  # a padding mask broadcasts
        bias = bias.expand(-1, heads, queries, -1)
        bias = bias.reshape(bias.size(0), groups, share * queries, -1)
    out = _attention(q, k, v, bias, dropout, scale)
    return out.reshape(b, heads, queries, d_k)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """Scaled dot-product attention of as many query as key/value heads."""
    if dropout or not torch.jit.is_tracing():
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
    # ONNX has no such function. The exporter would scale and transpose the keys in copies.
    logits = torch.matmul(q * (scale or 1 / math.sqrt(q.size(-1))), k.transpose(-2, -1))
    if bias is not None and bias.dtype == torch.bool:
        logits = logits.masked_fill(~bias, torch.finfo(logits.dtype).min)
    elif bias is not None:
        logits = logits + bias
    return torch.matmul(logits.softmax(-1), v)
