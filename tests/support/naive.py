"""Naive twins of the attention mechanisms, written from their formulas.

They take the weights of a module by name (`weights(module)`) and share no code with it. Every
frame pair is visited by its indices: query i, key j. `visible` is a (B, T, T) bool tensor.

Shape letters: B batch, T frames, H heads, D model size, d head size, r latent rank.
"""

import functools
import math

import torch
from torch import Tensor

# added to the normaliser of linear attention
EPSILON = 1e-6


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Leaf copies of the module's parameters, to differentiate by."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


@functools.cache
def position(distance: int, size: int) -> Tensor:
    """(D,) sinusoid of the distance i - j (arXiv 1706.03762, section 3.5; negative: ahead)."""
    values = []
    for k in range(0, size, 2):
        angle = distance / 10000 ** (k / size)
        values += [math.sin(angle), math.cos(angle)]
    return torch.tensor(values[:size], dtype=torch.float64)


def position_table(frames: int, size: int) -> Tensor:
    """(1, 2T-1, D): the distances T-1, ..., 0, ..., -(T-1), as ESPnet lays them out."""
    return torch.stack([position(d, size) for d in range(frames - 1, -frames, -1)])[None]


def chunk_visible(frames: int, size: int, left: int) -> Tensor:
    """(T, T): U2 (arXiv 2012.05481), frame by frame."""
    visible = torch.zeros(frames, frames, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            back = i // size - j // size
            visible[i, j] = back >= 0 and (left < 0 or back <= left)
    return visible


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = torch.einsum("oi,...i->...o", w[f"{name}.weight"], x)
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}.weight" not in w:
        return x
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
    return w[f"{name}.weight"] * scaled + w[f"{name}.bias"]


def _distribution(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys; all zero where there is none. (B, H, T), (B, T)."""
    shown = visible[:, None]
    powers = torch.where(shown, (logits - logits.detach().amax(-1, keepdim=True)).exp(), 0.0)
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total > 0, total, 1.0)


def _position_logits(w: dict[str, Tensor], q: Tensor, i: int, zero_triu: bool) -> Tensor:
    """(B, H, T): (q_i + v) . W_pos R_{i-j} for every j (arXiv 1901.02860, section 3.3)."""
    _, frames, heads, d = q.shape
    r = torch.stack([position(i - j, heads * d) for j in range(frames)])  # (T, D)
    r = linear(w, "linear_pos", r).view(frames, heads, d)
    logits = torch.einsum("bhd,jhd->bhj", q[:, i] + w["pos_bias_v"], r)
    if zero_triu:
        logits = torch.cat([logits[:, :, : i + 1], 0 * logits[:, :, i + 1 :]], dim=-1)
    return logits


def softmax_attention(
    w: dict[str, Tensor],
    x: Tensor,
    heads: int,
    visible: Tensor,
    kv_heads: int | None = None,
    zero_triu: bool = False,
) -> Tensor:
    """MHA, and GQA / MQA with fewer kv_heads, with relative positions if `w` has any."""
    batch, frames, size = x.shape
    d, kv_heads = size // heads, kv_heads or heads
    q = layer_norm(w, "q_norm", linear(w, "linear_q", x).view(batch, frames, heads, d))
    k = layer_norm(w, "k_norm", linear(w, "linear_k", x).view(batch, frames, kv_heads, d))
    v = linear(w, "linear_v", x).view(batch, frames, kv_heads, d)
    owner = [h // (heads // kv_heads) for h in range(heads)]  # of each query head
    k, v = k[:, :, owner], v[:, :, owner]
    out = []
    for i in range(frames):
        content = q[:, i] + w["pos_bias_u"] if "pos_bias_u" in w else q[:, i]
        logits = torch.einsum("bhd,bjhd->bhj", content, k)
        if "linear_pos.weight" in w:
            logits = logits + _position_logits(w, q, i, zero_triu)
        attention = _distribution(logits / math.sqrt(d), visible[:, i])
        out.append(torch.einsum("bhj,bjhd->bhd", attention, v).flatten(1))
    return linear(w, "linear_out", torch.stack(out, dim=1))


def latent_attention(
    w: dict[str, Tensor], x: Tensor, heads: int, visible: Tensor, zero_triu: bool = False
) -> Tensor:
    """MLA on the latent itself: K and V are never formed (arXiv 2405.04434, section 2.1)."""
    batch, frames, size = x.shape
    d = size // heads
    q = linear(w, "linear_q", x).view(batch, frames, heads, d)
    c = linear(w, "linear_kv_down", x)  # (B, T, r)
    k_up = w["linear_k_up.weight"].view(heads, d, -1)
    v_up = w["linear_v_up.weight"].view(heads, d, -1)
    v_bias = w["linear_v_up.bias"].view(heads, d)
    out = []
    for i in range(frames):
        content = q[:, i] + w["pos_bias_u"] if "pos_bias_u" in w else q[:, i]
        absorbed = torch.einsum("bhd,hdr->bhr", content, k_up)
        logits = torch.einsum("bhr,bjr->bhj", absorbed, c)
        if "linear_pos.weight" in w:
            logits = logits + _position_logits(w, q, i, zero_triu)
        attention = _distribution(logits / math.sqrt(d), visible[:, i])
        latent = torch.einsum("bhj,bjr->bhr", attention, c)
        sees = attention.sum(-1, keepdim=True)  # 1, or 0 for a frame without visible keys
        values = torch.einsum("bhr,hdr->bhd", latent, v_up) + v_bias * sees
        out.append(values.flatten(1))
    return linear(w, "linear_out", torch.stack(out, dim=1))


def features(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """(B, T, H, d) -> (B, T, H, f)."""
    if name == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if name == "relu":
        return x.clamp(min=0)
    y = torch.einsum("bthd,hde->bthe", x, w["feature_map.weight"])
    powers = torch.cat([y, -y], dim=-1).exp()
    return powers / powers.sum(-1, keepdim=True)


def linear_attention(
    w: dict[str, Tensor],
    x: Tensor,
    heads: int,
    visible: Tensor,
    feature_map: str = "elu",
    decay: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """sum_j a_ij v_j / sum_j a_ij with a_ij = phi(q_i) . phi(k_j) (arXiv 2006.16236).

    Under chunks a key of an earlier chunk is multiplied by `decay` for each frame between it and
    the last frame before the query's chunk.
    """
    batch, frames, size = x.shape
    q, k, v = (
        linear(w, f"linear_{name}", x).view(batch, frames, heads, size // heads) for name in "qkv"
    )
    q, k = features(w, feature_map, q), features(w, feature_map, k)
    out = []
    for i in range(frames):
        fade = torch.ones(frames, dtype=x.dtype)
        if chunk is not None and decay is not None:
            begin = i // chunk * chunk
            for j in range(begin):
                fade[j] = decay ** (begin - 1 - j)
        a = torch.einsum("bhf,bjhf->bhj", q[:, i], k) * fade * visible[:, None, i]
        total = a.sum(-1, keepdim=True) + EPSILON
        out.append((torch.einsum("bhj,bjhd->bhd", a, v) / total).flatten(1))
    return linear(w, "linear_out", torch.stack(out, dim=1))
