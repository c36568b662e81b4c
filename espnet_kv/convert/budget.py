"""One budget of numbers per frame, divided among layers by what each loses.

Shape letters: D model size.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import head_rows
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.subspace import lost_by_rank
from espnet_kv.errors import UserError


def predicted_errors(attention: MultiHeadAttention, statistics: LayerStatistics) -> list[float]:
    """Squared error of the attention output at rank 0, 1, ..., D, predicted to first order.

    The lower convex hull of what the ranks lose (`subspace.lost_by_rank`); the entry at 0 is what
    is lost without keys and values.
    """
    keys = head_rows(attention.linear_k.weight, attention.h)
    values = head_rows(attention.linear_v.weight, attention.h)
    metric = OutputMetric.of(attention, statistics)
    maps = torch.cat([metric.left_k @ keys, metric.left_v @ values])
    roots = torch.cat([metric.right_k, metric.right_v])
    return lower_hull(lost_by_rank(maps, roots @ roots).tolist())


def lower_hull(values: Sequence[float]) -> list[float]:
    """The largest convex sequence that is nowhere above `values`."""
    corners: list[int] = []
    for place, value in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (place - b) < (value - values[b]) * (b - a):
                break
            corners.pop()
        corners.append(place)
    hull = [values[0]]
    for a, b in pairwise(corners):
        hull += [values[a] + (values[b] - values[a]) * n / (b - a) for n in range(1, b - a + 1)]
    return hull


def choose_ranks(
    layers: Mapping[str, tuple[MultiHeadAttention, LayerStatistics]],
    budget: int,
    effects: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """A rank for each layer, together no more than `budget`, each at least 1 and at most D.

    One number after another goes to the layer whose predicted error, times its effect, it lowers
    most. Those errors are convex in the rank, so that is the least sum, and more budget never
    lowers a rank.

    Args:
        budget: numbers per frame of all layers together.
        effects: of an error of each layer's output on the model's (`measure_effects`); None: an
            error counts by its share of what the layer puts out.

    Raises:
        UserError: budget below one number per layer.
    """
    if budget < len(layers):
        raise UserError(
            f"a cache of {budget} numbers per frame is too small for {len(layers)} layers: each "
            "needs at least 1"
        )
    gains = []
    for place, (name, layer) in enumerate(layers.items()):
        errors = predicted_errors(*layer)
        weight = effects[name] if effects else 1 / max(errors[0], torch.finfo(torch.float64).tiny)
        gains += [
            (weight * (after - before), rank, place, name)
            for rank, (before, after) in enumerate(pairwise(errors), 1)
            if rank > 1
        ]
    ranks = dict.fromkeys(layers, 1)
    for *_, name in sorted(gains)[: budget - len(layers)]:
        ranks[name] += 1
    return ranks
