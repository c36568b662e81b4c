"""Conversion of multi-head attention to latent attention (MLA) by low-rank factorisation.

Shape letters: H heads, D model size, d_k head size, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.convert.calls import Call
from espnet_kv.convert.layer_error import outputs, relative_error
from espnet_kv.convert.linalg import hartley, left_vectors, symmetric_root
from espnet_kv.convert.metric import SHRINK, OutputMetric
from espnet_kv.convert.modules import head_rows, replacement_module
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.subspace import best_rows, best_ups

# Candidate weights of key errors: their first-order estimate (`metric`) is far off where attention
# is concentrated on few frames.
KEY_SCALES = (0.5, 1.0, 2.0, 4.0)
# candidate shares of the covariance of all frames: few queries cover few directions
SHRINKS = (SHRINK, 0.5)
# the candidate of other methods, e.g. SVD-LLM: the same norm for all heads, keys and values
SECOND_MOMENT = "second moment"

type Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""down (r, D), up_k, up_v (D, r), and the bias of the values (D,)."""


class Method(NamedTuple):
    """A norm of the output error: share of the covariance, and weight of key errors (`metric`)."""

    shrink: float
    key_scale: float

    def __str__(self) -> str:
        return f"output error, shrink {self.shrink:g}, keys x {self.key_scale:g}"

    def metric(self, attention: MultiHeadAttention, statistics: LayerStatistics) -> OutputMetric:
        """The norm for a layer."""
        scaled = OutputMetric.of(attention, statistics, self.shrink)
        return scaled.with_keys_scaled(self.key_scale)


@dataclass(frozen=True)
class Fit:
    """A converted layer and the candidates it was chosen from.

    chosen: name of its method, a key of errors.
    errors: method -> relative error of the attention output on the inputs to choose by.
    second_moment: the candidate SECOND_MOMENT. method: the best of the others.
    """

    module: MultiHeadLatentAttention
    chosen: str
    errors: dict[str, float]
    second_moment: MultiHeadLatentAttention
    method: Method


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
    unseen: Sequence[Call] = (),
) -> MultiHeadLatentAttention:
    """Convert to latent attention with `rank` cached numbers per frame.

    Without statistics, this is `factorize_kv` of the weights; with statistics, `fit_mla`.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: rank is out of range.
    """
    if statistics is not None:
        return fit_mla(attention, rank, statistics, unseen).module
    plain = factorize_kv(attention.linear_k.weight, attention.linear_v.weight, rank)
    return with_weights(attention, rank, (*plain, attention.linear_v.bias))


@torch.no_grad()
def fit_mla(
    attention: MultiHeadAttention,
    rank: int,
    statistics: LayerStatistics,
    unseen: Sequence[Call] = (),
    method: Method | None = None,
) -> Fit:
    """Convert to latent attention by the method with the smallest error of the attention output.

    Candidates: `factorize_kv` with the second moment, and solutions in the norm
    `metric.OutputMetric` for several shares of the covariance and weights of key errors. In that
    norm, the down-projection is the best one (`subspace.best_rows`), and so is each head's
    up-projection (`subspace.best_ups`). The bias of the values compensates their mean error.

    Args:
        unseen: calls to choose by that the statistics do not contain; if empty, those of the
            statistics, which favours candidates that are fitted too closely.
        method: try only this norm of the output error.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: rank is out of range.
    """
    calls = unseen or statistics.calls
    k, v = attention.linear_k, attention.linear_v
    usual = factorize_kv(k.weight, v.weight, rank, statistics.second_moment)
    second_moment = with_weights(attention, rank, (*usual, v.bias))
    best = method or Method(SHRINK, 1.0)
    if rank >= k.in_features:  # no loss
        return Fit(second_moment, SECOND_MOMENT, {SECOND_MOMENT: 0.0}, second_moment, best)
    modules: dict[str, MultiHeadLatentAttention] = {SECOND_MOMENT: second_moment}
    expected = outputs(attention, calls)
    errors = {SECOND_MOMENT: relative_error(outputs(second_moment, calls), expected)}

    def error(candidate: Method) -> float:
        if (name := str(candidate)) not in errors:
            metric = candidate.metric(attention, statistics)
            modules[name] = with_weights(
                attention, rank, _latent(attention, rank, statistics, metric)
            )
            errors[name] = relative_error(outputs(modules[name], calls), expected)
        return errors[name]

    if method is None:
        best = min((Method(SHRINK, scale) for scale in KEY_SCALES), key=error)
        best = min((Method(shrink, best.key_scale) for shrink in SHRINKS), key=error)
    error(best)
    chosen = min(errors, key=lambda name: errors[name])
    return Fit(modules[chosen], chosen, errors, second_moment, best)


def _latent(
    attention: MultiHeadAttention, rank: int, statistics: LayerStatistics, metric: OutputMetric
) -> Weights:
    """The best weights in the norm `metric`."""
    h = attention.h
    keys, values = head_rows(attention.linear_k.weight, h), head_rows(attention.linear_v.weight, h)
    maps = torch.cat([metric.left_k @ keys, metric.left_v @ values])
    roots = torch.cat([metric.right_k, metric.right_v])
    rows = best_rows(maps, roots @ roots, rank)
    ups = best_ups(torch.cat([keys, values]), roots, rows)  # (2 H, d_k, r)
    value_error = values - ups[h:] @ rows
    bias = head_rows(attention.linear_v.bias[:, None], h)[..., 0]
    bias = bias + torch.einsum("hij,hj->hi", value_error, statistics.pooled_mean)
    # orthonormal up-projections: the latent has the scale of the keys and values
    up, basis = torch.linalg.qr(ups.flatten(0, 1))
    up_k, up_v = up.chunk(2)
    return basis @ rows, up_k, up_v, bias.flatten()


@torch.no_grad()
def with_weights(
    attention: MultiHeadAttention, rank: int, weights: Weights
) -> MultiHeadLatentAttention:
    """The attention with `weights`, its latent rotated so that its numbers are of similar size.

    The first numbers of a latent from an SVD are much larger than the rest. Integers of a
    quantised cache have one scale per latent, and 4 bits then resolve only the largest numbers.
    The rotation is exact and free, and halves their error in cross-attention of Whisper models. A
    scale per 32 numbers helps less there, needs more bytes and changes the format of all caches.
    """
    new = replacement_module(attention, MultiHeadLatentAttention, kv_rank=rank)
    down, up_k, up_v, v_bias = weights
    rotation = hartley(rank).to(down.device)  # its own inverse
    new.linear_kv_down.weight.copy_(rotation @ down.double())
    new.linear_k_up.weight.copy_(up_k.double() @ rotation)
    new.linear_v_up.weight.copy_(up_v.double() @ rotation)
    new.linear_v_up.bias.copy_(v_bias)
    return new
