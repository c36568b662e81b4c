"""Multi-head attention to latent attention: keys and values read from one latent.

Shape letters: H heads, D model size, d_k head size, r rank.
"""

import torch
from torch import Tensor

from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.convert.layer_error import output_error
from espnet_kv.convert.linalg import left_vectors, symmetric_root
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import head_rows, successor
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.subspace import best_rows, best_ups

# how much an error of keys counts, beside its bound (`metric`): what gives the least output error
# on the calibration inputs is kept
KEY_SCALES = (0.5, 1.0)


def factorize_kv(
    weight_k: Tensor, weight_v: Tensor, rank: int, second_moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best [up_k; up_v] down of a rank for [weight_k; weight_v], by truncated SVD.

    Best for activations: E |(W - up down) x|^2 is least for x of the given second moment (without
    one, in the Frobenius norm). With S S' the moment, W S = A s B' and A_r the first r columns of
    A, that is up = A_r, down = A_r' W: nothing is inverted, whatever the moment's condition.
    Directions that the data never takes count a little (`linalg.CUT_OFF`), so that rank left over
    goes to them.

    Args:
        weight_k, weight_v: (any, D), as torch.nn.Linear holds them.
        rank: r; more than D adds zeros.
        second_moment: (D, D), E[x x'].

    Returns:
        down (r, D), up_k, up_v (rows of the weight, r), in the type of weight_k. Computed in
        float64; the columns of [up_k; up_v] are orthonormal up to rank D.
    """
    stacked = torch.cat([weight_k, weight_v]).detach().double()
    weighted = stacked
    if second_moment is not None and second_moment.any():
        weighted = stacked @ symmetric_root(second_moment.double())
    up = left_vectors(weighted, rank)
    up_k, up_v = up.split([len(weight_k), len(weight_v)])
    dtype = weight_k.dtype
    return (up.T @ stacked).to(dtype), up_k.to(dtype), up_v.to(dtype)


@torch.no_grad()
def to_mla(
    attention: MultiHeadAttention, rank: int, statistics: LayerStatistics | None = None
) -> MultiHeadLatentAttention:
    """Multi-head attention with its keys and values read from a latent of `rank` numbers.

    Without statistics: `factorize_kv` of the weights alone. With them, what is made small is the
    error of the attention output (`metric.OutputMetric`): the latent is the best one in that norm
    (`subspace.best_rows`), each head's map from it the best in its own, and the mean error of the
    values is taken out by their bias.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: rank is out of range.
    """
    new = successor(attention, MultiHeadLatentAttention, kv_rank=rank)
    if statistics is None or rank >= attention.linear_k.in_features:  # nothing is lost then
        plain = factorize_kv(attention.linear_k.weight, attention.linear_v.weight, rank)
        _set(new, *plain, attention.linear_v.bias)
        return new
    candidates = [_latent(attention, rank, statistics, scale) for scale in KEY_SCALES]
    errors = []
    for weights in candidates:
        _set(new, *weights)
        errors.append(output_error(attention, new, statistics.calls))
    _set(new, *candidates[errors.index(min(errors))])
    return new


def _latent(
    attention: MultiHeadAttention, rank: int, statistics: LayerStatistics, key_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """down, up_k, up_v and the bias of the values for one weight of keys beside values."""
    h = attention.h
    metric = OutputMetric.of(attention, statistics, key_scale)
    keys, values = head_rows(attention.linear_k.weight, h), head_rows(attention.linear_v.weight, h)
    maps = torch.cat([metric.left_k @ keys, metric.left_v @ values])
    roots = torch.cat([metric.right_k, metric.right_v])
    rows = best_rows(maps, roots @ roots, rank)
    ups = best_ups(torch.cat([keys, values]), roots, rows)  # (2 H, d_k, r)
    lost = values - ups[h:] @ rows
    bias = head_rows(attention.linear_v.bias[:, None], h)[..., 0]
    bias = bias + torch.einsum("hij,hj->hi", lost, statistics.pooled_mean)
    # a basis of the latent in which it is as large as the keys and values it is made of
    up, turn = torch.linalg.qr(ups.flatten(0, 1))
    up_k, up_v = up.chunk(2)
    return turn @ rows, up_k, up_v, bias.flatten()


def _set(
    new: MultiHeadLatentAttention, down: Tensor, up_k: Tensor, up_v: Tensor, v_bias: Tensor
) -> None:
    new.linear_kv_down.weight.copy_(down)
    new.linear_k_up.weight.copy_(up_k)
    new.linear_v_up.weight.copy_(up_v)
    new.linear_v_up.bias.copy_(v_bias)
