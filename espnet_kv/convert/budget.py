"""Allocation of one cache budget (numbers per frame) to layers by their predicted errors.

Shape letters: D model size.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import head_rows
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.subspace import error_by_rank
from espnet_kv.errors import UserError


def predicted_errors(attention: MultiHeadAttention, statistics: LayerStatistics) -> list[float]:
    """Squared error of the attention output at rank 0, 1, ..., D, predicted to first order.

    This is the lower convex hull of `subspace.error_by_rank`. The entry at rank 0 is the error
    without any keys and values.
    """
    keys = head_rows(attention.linear_k.weight, attention.h)
    values = head_rows(attention.linear_v.weight, attention.h)
    metric = OutputMetric.of(attention, statistics)
    maps = torch.cat([metric.left_k @ keys, metric.left_v @ values])
    roots = torch.cat([metric.right_k, metric.right_v])
    return lower_hull(error_by_rank(maps, roots @ roots).tolist())


def lower_hull(values: Sequence[float]) -> list[float]:
    """The largest convex sequence that does not exceed `values` anywhere."""
    corners: list[int] = []
    for position, value in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (position - b) < (value - values[b]) * (b - a):
                break
            corners.pop()
        corners.append(position)
    hull = [values[0]]
    for a, b in pairwise(corners):
        hull += [values[a] + (values[b] - values[a]) * n / (b - a) for n in range(1, b - a + 1)]
    return hull


def choose_ranks(
    layers: Mapping[str, tuple[MultiHeadAttention, LayerStatistics]],
    budget: int,
    effects: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Choose a rank from 1 to D for each layer; the ranks sum to at most `budget`.

    Greedy: each further number goes to the layer where it reduces the weighted predicted error
    most. The errors are convex in the rank, so the result minimises their sum. A larger budget
    never lowers a rank.

    Args:
        layers: name -> attention module and its statistics.
        budget: numbers per frame, all layers together.
        effects: weight of each layer's error (`measure_effects`). None: errors are relative to
            the layer's own output.

    Raises:
        UserError: budget below one number per layer.
    """
    if budget < len(layers):
        raise UserError(
            f"a cache of {budget} numbers per frame is too small for {len(layers)} layers: each "
            "needs at least 1"
        )
    gains = []
    for position, (name, layer) in enumerate(layers.items()):
        errors = predicted_errors(*layer)
        weight = effects[name] if effects else 1 / max(errors[0], torch.finfo(torch.float64).tiny)
        gains += [
            (weight * (after - before), rank, position, name)
            for rank, (before, after) in enumerate(pairwise(errors), 1)
            if rank > 1
        ]
    ranks = dict.fromkeys(layers, 1)
    for *_, name in sorted(gains)[: budget - len(layers)]:
        ranks[name] += 1
    return ranks
