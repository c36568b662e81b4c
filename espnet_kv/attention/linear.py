"""Linear attention (arXiv 2006.16236), whose state has a constant size.

Shape letters beyond those of `base`: N chunks, C frames in a chunk, f size of the feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_kv.attention.base import Attention, HeadSizes
from espnet_kv.attention.chunks import Chunks
from espnet_kv.cache.footprint import Footprint
from espnet_kv.cache.state import StateSpec, SumState
from espnet_kv.cache.step import CacheStep
from espnet_kv.errors import ConfigError

# avoids a division by zero for a frame without visible keys (padding)
EPSILON = 1e-6


class EluFeatures(nn.Module):
    """phi(x) = elu(x) + 1 (arXiv 2006.16236). (..., d_k) -> (..., d_k)."""

    def __init__(self, heads: int, d_k: int):
        super().__init__()
        self.size = d_k

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


class ReluFeatures(nn.Module):
    """phi(x) = relu(x). (..., d_k) -> (..., d_k)."""

    def __init__(self, heads: int, d_k: int):
        super().__init__()
        self.size = d_k

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class HedgehogFeatures(nn.Module):
    """phi(x) = softmax([W x, -W x]), W learned per head (arXiv 2402.04347).

    (B, H, T, d_k) -> (B, H, T, 2 d_k).
    """

    def __init__(self, heads: int, d_k: int):
        super().__init__()
        self.size = 2 * d_k
        self.weight = nn.Parameter(torch.empty(heads, d_k, d_k))
        self.espnet_initialization_fn()

    def espnet_initialization_fn(self) -> None:
        """Initialise W to the identity; ESPnet's `init` calls this after its own initialisation."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.weight.size(-1)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(x, self.weight.to(x.dtype))
        return torch.softmax(torch.cat([x, -x], dim=-1), dim=-1)


FEATURE_MAPS = {"elu": EluFeatures, "relu": ReluFeatures, "hedgehog": HedgehogFeatures}


class LinearAttention(Attention):
    """out_i = phi(q_i) S_i / phi(q_i) z_i with S = sum phi(k_j) v_j', z = sum phi(k_j).

    The sums run over the frames visible to i: all frames, or under `Chunks` its own chunk and all
    chunks before it. The state is S and z, H (f d_k + f) numbers for any length. `left` of Chunks
    has no effect, because a term of a sum cannot be removed; `decay` limits the context instead.
    Relative positions are not used: the convolutions of the block supply locality.

    Args:
        sizes, dropout_rate, rel_pos: see Attention; dropout acts on the output.
        feature_map: elu, relu or hedgehog.
        decay: factor in (0, 1] per frame on the sums of earlier chunks; None: no decay. Terms of
            the current chunk do not decay.

    Raises:
        ConfigError (a ValueError): unknown feature_map, decay out of range.
    """

    options = ("feature_map", "decay")
    colour_slot = 3

    def __init__(
        self,
        sizes: HeadSizes,
        dropout_rate: float,
        rel_pos: bool,
        *,
        feature_map: str = "elu",
        decay: float | None = None,
    ):
        super().__init__(sizes, dropout_rate, rel_pos)
        if feature_map not in tuple(FEATURE_MAPS):
            raise ConfigError(
                f"attention_conf.feature_map: unknown {feature_map!r} "
                f"(allowed: {', '.join(FEATURE_MAPS)})"
            )
        if decay is not None and not (type(decay) in (int, float) and 0 < decay <= 1):
            raise ConfigError(f"attention_conf.decay: {decay!r} is not in (0, 1] (or null)")
        self.decay = decay
        self.feature_map_name = feature_map
        self.feature_map = FEATURE_MAPS[feature_map](self.h, self.d_k)
        self.linear_q = nn.Linear(sizes.n_feat, sizes.n_feat)
        self.linear_k = nn.Linear(sizes.n_feat, sizes.n_feat)
        self.linear_v = nn.Linear(sizes.n_feat, sizes.n_feat)
        self.linear_out = nn.Linear(sizes.n_feat, sizes.n_feat)
        self.dropout = nn.Dropout(dropout_rate)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, d_k)."""
        return x.view(*x.shape[:2], self.h, self.d_k).transpose(1, 2)

    def attend(self, query, key, value, mask, chunks):
        q, k = self._heads(self.linear_q(query)), self._heads(self.linear_k(key))
        v = self._heads(self.linear_v(value))
        # sums over a long utterance exceed the range of half precision
        with torch.autocast(query.device.type, enabled=False):
            dtype = torch.promote_types(q.dtype, torch.float32)
            q, k, v = self.feature_map(q.to(dtype)), self.feature_map(k.to(dtype)), v.to(dtype)
            if mask is not None and mask.size(1) != 1:
                out = _pairwise(q, k, v, mask, chunks, self.decay)
            else:
                if mask is not None:
                    k = k * mask[:, :, :, None].ne(0)  # (B, 1, S, 1): zero for padding
                out = self._chunked(q, k, v, chunks) if chunks.size else _all_pairs(q, k, v)
        out = out.to(query.dtype).transpose(1, 2).flatten(2)
        return self.linear_out(self.dropout(out))

    @property
    def features(self) -> int:
        """Size f of the feature map."""
        return int(self.feature_map.size)  # type: ignore[arg-type]

    def init_state(self, spec: StateSpec) -> SumState:
        return SumState(spec, self.h, self.features, self.d_k)

    @property
    def footprint(self) -> Footprint:
        return Footprint(sums=self.h * self.features * (self.d_k + 1))

    @property
    def label(self) -> str:
        words = ["linear"]
        if self.feature_map_name != "elu":
            words.append(self.feature_map_name)
        if self.decay is not None:
            words.append(f"decay {self.decay:g}")
        return " ".join(words)

    def step(self, x, step):
        rows = step.rows_per_sum(x)
        return self._step(rows, step).view(x.shape)

    def _step(self, x: Tensor, step: CacheStep) -> Tensor:
        state = step.states[self.state_index]
        past = state.read(step)  # (R, H, f, d_k + 1)
        k, v = self._terms(x, step.valid, past.dtype)
        with torch.autocast(x.device.type, enabled=False):
            seen = left = past + torch.matmul(k.transpose(-1, -2), v)
            if self.decay is not None:
                frames = k.size(2)
                faded = k * _decay_weights(frames, self.decay, k)
                left = past * self.decay**frames + torch.matmul(faded.transpose(-1, -2), v)
            state.append(step, left)
        return self._attend_to_sums(x, seen)

    def init_cross_state(self, memory, spec, mask):
        state = self.init_state(spec)
        valid = None if mask is None else mask[:, :, :, None].ne(0)
        k, v = self._terms(memory, valid, state.tensors[0].dtype)
        with torch.autocast(memory.device.type, enabled=False):
            state.tensors[0].copy_(torch.matmul(k.transpose(-1, -2), v))
        return state

    def cross_attend(self, x, step):
        return self._attend_to_sums(x, step.memory.states[self.state_index].tensors[0])

    def _terms(self, x: Tensor, valid: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """phi(k) (B, H, S, f) and (v, 1) (B, H, S, d_k + 1) of frames x (B, S, D).

        The column of ones yields the sum of phi(k). Frames not valid (B, 1, S, 1) are zero.
        """
        k, v = self._heads(self.linear_k(x)), self._heads(self.linear_v(x))
        with torch.autocast(x.device.type, enabled=False):
            k, v = self.feature_map(k.to(dtype)), F.pad(v.to(dtype), (0, 1), value=1.0)
            return (k if valid is None else k * valid), v

    def _attend_to_sums(self, x: Tensor, sums: Tensor) -> Tensor:
        """Attend with frames x (B, Q, D) to sums (B, H, f, d_k + 1) -> (B, Q, D)."""
        q = self._heads(self.linear_q(x))
        with torch.autocast(x.device.type, enabled=False):
            out = torch.matmul(self.feature_map(q.to(sums.dtype)), sums)
            out = out[..., :-1] / (out[..., -1:] + EPSILON)
        return self.linear_out(out.to(x.dtype).transpose(1, 2).flatten(2))

    def _chunked(self, q: Tensor, k: Tensor, v: Tensor, chunks: Chunks) -> Tensor:
        """Attend chunk by chunk: q, k (B, H, T, f), v (B, H, T, d_k) -> (B, H, T, d_k)."""
        size, frames = chunks.size, q.size(2)
        pad = (0, 0, 0, -frames % size)
        q, k, v = (F.pad(x, pad).unflatten(2, (-1, size)) for x in (q, k, v))  # (B, H, N, C, .)
        own = torch.matmul(k.transpose(-1, -2), v)  # (B, H, N, f, d_k)
        own_norm = k.sum(dim=3)  # (B, H, N, f)
        if self.decay is None or self.decay == 1:
            state, norm = own.cumsum(dim=2), own_norm.cumsum(dim=2)
        else:
            state, norm = _decayed_sums(k, v, own, own_norm, self.decay)
        out = torch.matmul(q, state) / (
            torch.matmul(q, norm.unsqueeze(-1)) + EPSILON
        )  # (B, H, N, C, d_k)
        return out.flatten(2, 3)[:, :, :frames]


def _all_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All keys are visible to all queries: q (B, H, Q, f), k (B, H, S, f), v (B, H, S, d_k)."""
    state = torch.matmul(k.transpose(-1, -2), v)  # (B, H, f, d_k)
    norm = torch.matmul(q, k.sum(dim=2).unsqueeze(-1))  # (B, H, Q, 1)
    return torch.matmul(q, state) / (norm + EPSILON)


def _pairwise(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, chunks: Chunks, decay: float | None
) -> Tensor:
    """Attend with an arbitrary mask (B, Q, S); quadratic in the length."""
    visible = mask[:, None].ne(0)
    if chunks.size:
        frames = torch.arange(k.size(2), device=k.device)
        visible = visible & Chunks(None, chunks.size).visible(frames, frames)
    weights = torch.matmul(q, k.transpose(-1, -2)) * visible  # (B, H, Q, S)
    if chunks.size and decay is not None:
        begins = frames // chunks.size * chunks.size
        ages = (begins[:, None] - 1 - frames).clamp(min=0)
        weights = weights * decay ** ages.to(weights.dtype)
    return torch.matmul(weights, v) / (weights.sum(dim=-1, keepdim=True) + EPSILON)


def _decay_weights(size: int, decay: float, like: Tensor) -> Tensor:
    """(C, 1): weight decay^j of the key j frames before the end of a chunk, in the next chunk."""
    ages = torch.arange(size - 1, -1, -1, device=like.device, dtype=like.dtype)
    return (decay**ages)[:, None]


def _decayed_sums(k: Tensor, v: Tensor, own: Tensor, own_norm: Tensor, decay: float):
    """Sums of each chunk: its own terms plus the decayed sums of the chunks before it."""
    size = k.size(3)
    left = k * _decay_weights(size, decay, k)
    left_state, left_norm = torch.matmul(left.transpose(-1, -2), v), left.sum(dim=3)
    past, past_norm = torch.zeros_like(own[:, :, 0]), torch.zeros_like(own_norm[:, :, 0])
    states, norms = [], []
    for n in range(own.size(2)):
        states.append(own[:, :, n] + past)
        norms.append(own_norm[:, :, n] + past_norm)
        past = past * decay**size + left_state[:, :, n]
        past_norm = past_norm * decay**size + left_norm[:, :, n]
    return torch.stack(states, dim=2), torch.stack(norms, dim=2)
