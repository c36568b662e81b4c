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


def predicted_errors(
    attention: MultiHeadAttention,
    statistics: LayerStatistics,
    metric: OutputMetric | None = None,
) -> list[float]:
    """Squared error of the model's output at rank 0, 1, ..., D, predicted to first order.

    This is the lower convex hull of `subspace.error_by_rank`. The entry at rank 0 is the error
    without any keys and values. Layers of one model are comparable (`metric.OutputMetric`).

    Args:
        metric: the norm of the errors; None: `OutputMetric.of` the layer.
    """
    keys = head_rows(attention.linear_k.weight, attention.h)
    values = head_rows(attention.linear_v.weight, attention.h)
    metric = metric or OutputMetric.of(attention, statistics)
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


def choose_ranks(errors: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Choose a rank from 1 to D for each layer; the ranks sum to at most `budget`.

    Greedy: each further number goes to the layer where it reduces the error most. The errors are
    convex in the rank, so the result minimises their sum. A larger budget never lowers a rank.

    Args:
        errors: name -> error by the layer at rank 0, 1, ..., D (`predicted_errors`).
        budget: numbers per frame, all layers together.

    Raises:
        UserError: budget below one number per layer.
    """
    if budget < len(errors):
        raise UserError(
            f"a cache of {budget} numbers per frame is too small for {len(errors)} layers: each "
            "needs at least 1"
        )
    gains = []
    for position, (name, of_layer) in enumerate(errors.items()):
        gains += [
            (after - before, rank, position, name)
            for rank, (before, after) in enumerate(pairwise(of_layer), 1)
            if rank > 1
        ]
    ranks = dict.fromkeys(errors, 1)
    for *_, name in sorted(gains)[: budget - len(errors)]:
        ranks[name] += 1
    return ranks
