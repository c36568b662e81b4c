"""Conversion of multi-head attention to latent attention (MLA) by low-rank factorisation.

Shape letters: H heads, D model size, d_k head size, r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from espnet_kv.attention.base import share_one_state
from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.convert.linalg import hartley, left_vectors, symmetric_root
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import head_rows, replacement_module
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.subspace import best_rows, best_ups

type Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""down (r, D), up_k, up_v (D, r), and the bias of the values (D,)."""


def factorize_kv(
    weight_k: Tensor, weight_v: Tensor, rank: int, second_moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best approximation of W = [weight_k; weight_v] by [up_k; up_v] down, by truncated SVD.

    Minimises E |(W - up down) x|^2 for inputs x with the given second moment; without one, the
    Frobenius norm of the weight error. With S S' the moment, W S = A s B' and A_r the first r
    columns of A, the solution is up = A_r, down = A_r' W. No inverse is needed, so the moment may
    be singular. Directions without data have a small weight (`linalg.CUT_OFF`), so that they
    receive the remaining rank.

    Args:
        weight_k, weight_v: (any, D), weights of torch.nn.Linear.
        rank: r; ranks above D are filled with zeros.
        second_moment: (D, D), E[x x'].

    Returns:
        down (r, D), up_k, up_v (rows of the weight, r), in the dtype of weight_k. Computed in
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
    attention: MultiHeadAttention,
    rank: int,
    statistics: LayerStatistics | None = None,
    metric: OutputMetric | None = None,
) -> MultiHeadLatentAttention:
    """Convert to latent attention with `rank` cached numbers per frame.

    Without statistics, this is `factorize_kv` of the weights. With statistics, the error in the
    norm of `metric` is minimised: the down-projection is the best one in that norm
    (`subspace.best_rows`), and so is each head's up-projection (`subspace.best_ups`). The bias of
    the values compensates their mean error.

    Args:
        metric: the norm; None: `OutputMetric.of` the layer.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: rank is out of range.
    """
    known = None
    if statistics is not None:
        known = [(statistics, metric or OutputMetric.of(attention, statistics))]
    (weights,) = _latent([attention], rank, known)
    return _with_weights(attention, rank, weights)


@torch.no_grad()
def to_shared_mla(
    attentions: Sequence[MultiHeadAttention],
    rank: int,
    known: Sequence[tuple[LayerStatistics, OutputMetric]] | None = None,
) -> list[MultiHeadLatentAttention]:
    """Convert the cross-attention modules of a decoder to one latent for all (`share_state`).

    They read the same frames, so that nothing is lost with a rank of D, whatever their number.
    Otherwise the sum of their errors is minimised as `to_mla` does it.

    Args:
        known: statistics and metric of each module; None: fit to the weights only.

    Raises:
        UserError, ConfigError: see `to_mla`.
    """
    made = [
        _with_weights(attention, rank, weights)
        for attention, weights in zip(attentions, _latent(attentions, rank, known), strict=True)
    ]
    share_one_state(made)
    return made


@torch.no_grad()
def to_mla_by_second_moment(
    attention: MultiHeadAttention, rank: int, statistics: LayerStatistics
) -> MultiHeadLatentAttention:
    """Convert by `factorize_kv` with the second moment of the frames (activation-aware SVD).

    Raises:
        UserError, ConfigError: see `to_mla`.
    """
    k, v = attention.linear_k, attention.linear_v
    weights = factorize_kv(k.weight, v.weight, rank, statistics.second_moment)
    return _with_weights(attention, rank, (*weights, v.bias))


def _latent(
    attentions: Sequence[MultiHeadAttention],
    rank: int,
    known: Sequence[tuple[LayerStatistics, OutputMetric]] | None,
) -> list[Weights]:
    """Weights of modules with one latent: the best in their metrics, or in the Frobenius norm."""
    count, size = len(attentions), attentions[0].linear_k.in_features
    if known is None or rank >= size:  # nothing is lost
        keys, values = (
            torch.cat([getattr(attention, name).weight for attention in attentions])
            for name in ("linear_k", "linear_v")
        )
        down, up_k, up_v = factorize_kv(keys, values, rank)
        of_each = zip(up_k.chunk(count), up_v.chunk(count), attentions, strict=True)
        return [(down, k, v, attention.linear_v.bias) for k, v, attention in of_each]
    plain, maps, roots = list[Tensor](), list[Tensor](), list[Tensor]()
    for attention, (_, metric) in zip(attentions, known, strict=True):
        keys = head_rows(attention.linear_k.weight, attention.h)
        values = head_rows(attention.linear_v.weight, attention.h)
        plain += keys, values
        maps += metric.left_k @ keys, metric.left_v @ values
        roots += metric.right_k, metric.right_v
    of, root = torch.cat(plain), torch.cat(roots)
    rows = best_rows(torch.cat(maps), root @ root, rank)
    ups = best_ups(of, root, rows)  # (2 H for each module, d_k, r)
    errors = (of - ups @ rows).chunk(2 * count)
    # orthonormal up-projections: the latent has the scale of the keys and values
    up, basis = torch.linalg.qr(ups.flatten(0, 1))
    parts = up.chunk(2 * count)
    weights = list[Weights]()
    for n, (attention, (statistics, _)) in enumerate(zip(attentions, known, strict=True)):
        bias = head_rows(attention.linear_v.bias[:, None], attention.h)[..., 0]
        bias = bias + torch.einsum("hij,hj->hi", errors[2 * n + 1], statistics.pooled_mean)
        weights.append((basis @ rows, parts[2 * n], parts[2 * n + 1], bias.flatten()))
    return weights


def _with_weights(
    attention: MultiHeadAttention, rank: int, weights: Weights
) -> MultiHeadLatentAttention:
    """The attention with `weights`, its latent rotated so that its numbers are of similar size.

    The first numbers of a latent from an SVD are much larger than the rest. Integers of a
    quantised cache share scales, and 4 bits then resolve only the largest numbers that share one.
    The rotation is exact and free, and halves their error in cross-attention of Whisper models.
    """
    new = replacement_module(attention, MultiHeadLatentAttention, kv_rank=rank)
    down, up_k, up_v, v_bias = weights
    rotation = hartley(rank).to(down.device)  # its own inverse
    new.linear_kv_down.weight.copy_(rotation @ down.double())
    new.linear_k_up.weight.copy_(up_k.double() @ rotation)
    new.linear_v_up.weight.copy_(up_v.double() @ rotation)
    new.linear_v_up.bias.copy_(v_bias)
    return new
