"""Keys and values from one latent: [W_k; W_v] as a product of two thinner matrices.

Shape letters: D model size (inputs), r rank.
"""

import math

import torch
from torch import Tensor

from espnet_kv.attention.mha import MultiHeadAttention
from espnet_kv.attention.mla import MultiHeadLatentAttention
from espnet_kv.convert.errors import output_error
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.modules import head_rows, successor
from espnet_kv.convert.statistics import LayerStatistics

# errors of keys over errors of values, beside weights that make both the same size
SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def factorize_kv(
    weight_k: Tensor, weight_v: Tensor, rank: int, second_moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best [up_k; up_v] down of a rank for [weight_k; weight_v], by truncated SVD.

    Best for activations: E |(W - up down) x|^2 is least for x of the given second moment (without
    one, in the Frobenius norm). With S S' the moment, W S = A s B' and A_r the first r columns of
    A, that is up = A_r, down = A_r' W: nothing is inverted, whatever the moment's condition.
    Directions that the data never takes count a little (see `linalg.CUT_OFF`), so that rank left
    over goes to them.

    Args:
        weight_k, weight_v: (any, D), as torch.nn.Linear holds them.
        rank: r; more than D adds zeros.
        second_moment: (D, D), E[x x'].

    Returns:
        down (r, D), up_k, up_v (rows of the weight, r), in the type of weight_k. Computed in
        float64; the columns of [up_k; up_v] are orthonormal up to rank D.
    """
    stacked = torch.cat([weight_k, weight_v]).double()
    weighted = stacked if second_moment is None else stacked @ symmetric_root(second_moment)
    up = left_vectors(weighted, rank)
    up_k, up_v = up.split([len(weight_k), len(weight_v)])
    dtype = weight_k.dtype
    return (up.T @ stacked).to(dtype), up_k.to(dtype), up_v.to(dtype)


def left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """(n, rank): the first left singular vectors of (n, m), zeros where there are no more."""
    vectors = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    # the sign is the SVD's choice: largest entry positive, for the same result everywhere
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.nn.functional.pad(vectors * signs, (0, rank - vectors.size(1)))


def to_mla(
    attention: MultiHeadAttention, rank: int, statistics: LayerStatistics | None = None
) -> MultiHeadLatentAttention:
    """Multi-head attention with its keys and values read from a latent of `rank` numbers.

    Without statistics: `factorize_kv`. With them, the error that counts is that of the attention
    output, and two parts of the error of keys and values do not reach it: a constant added to all
    keys, which softmax cancels, and the mean error of the values, which goes into their bias
    (weights sum to one). So what is factorised are deviations from the mean frame; K meets the
    queries and V the output projection. How much an error of K counts beside one of V is found by
    trying (SCALES) on the calibration inputs.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: rank is out of range.
    """
    new = successor(attention, MultiHeadLatentAttention, kv_rank=rank)
    weight_k, weight_v = attention.linear_k.weight.double(), attention.linear_v.weight.double()
    with torch.no_grad():
        new.linear_v_up.bias.copy_(attention.linear_v.bias)
        if statistics is None:
            _set_weights(new, *factorize_kv(weight_k, weight_v, rank))
            return new
        best = math.inf
        for scale in SCALES:
            down = _weighted_down(attention, rank, statistics, scale)
            _set_weights(new, down, *_refit(weight_k, weight_v, down, statistics))
            _absorb_mean(new, attention, statistics)
            error = output_error(attention, new, statistics.calls)
            if error < best:
                best, kept = error, {k: v.clone() for k, v in new.state_dict().items()}
        new.load_state_dict(kept)
    return new


def _weighted_singular(attention, statistics, scale):
    stacked, root = _weighted(attention, statistics, scale)
    return torch.linalg.svdvals(stacked @ root)


def _weighted_down(attention, rank: int, statistics: LayerStatistics, scale: float) -> Tensor:
    stacked, root = _weighted(attention, statistics, scale)
    return left_vectors(stacked @ root, rank).T @ stacked


def _weighted(attention, statistics, scale):
    root = symmetric_root(statistics.covariance)
    query_root = symmetric_root(statistics.query_moment) / math.sqrt(attention.d_k)
    keys = query_root @ head_rows(attention.linear_k.weight, attention.h)  # (H, d_k, D)
    values = attention.linear_out.weight.double() @ attention.linear_v.weight.double()
    keys = keys.flatten(0, 1)
    balance = scale * (values @ root).norm() / (keys @ root).norm().clamp(min=1e-300)
    return torch.cat([balance * keys, values]), root


def _refit(weight_k, weight_v, down, statistics):
    root = symmetric_root(statistics.covariance)
    inverse = torch.linalg.pinv(down @ root)
    return weight_k @ root @ inverse, weight_v @ root @ inverse


def _absorb_mean(new, attention, statistics):
    weight = attention.linear_v.weight.double()
    lost = weight - new.linear_v_up.weight.double() @ new.linear_kv_down.weight.double()
    new.linear_v_up.bias.copy_(attention.linear_v.bias + lost @ statistics.mean)


def _set_weights(new: MultiHeadLatentAttention, down: Tensor, up_k: Tensor, up_v: Tensor) -> None:
    new.linear_kv_down.weight.copy_(down)
    new.linear_k_up.weight.copy_(up_k)
    new.linear_v_up.weight.copy_(up_v)


@torch.no_grad()
def error_spectrum(attention: MultiHeadAttention, statistics: LayerStatistics) -> Tensor:
    """(D,): what each further rank takes off the predicted squared error, largest first."""
    return _weighted_singular(attention, statistics, 1.0).square()
