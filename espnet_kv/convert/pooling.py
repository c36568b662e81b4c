"""Multi-head attention with fewer key/value heads: grouped-query attention.

Query heads of one group read the same keys and values. A head's keys may be put into another
basis, K = T K', when its queries follow, q' = T' q (T' q . K' = q . T K'), and so may its values
when the output projection follows. So a group needs no likeness of its heads as they stand: its
keys are the best d_k directions of all its heads' keys together, and the same for values.
Relative positions meet the same queries in (q + pos_bias_v) . W_pos p: T^-1 W_pos leaves that as
it was, exactly.

Shape letters: H heads, G key/value heads, D model size, d_k head size.
"""

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from espnet_kv.attention.grouped import GroupedQueryAttention, MultiHeadAttention
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import head_rows, successor
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.subspace import best_rows, best_ups

# A head whose keys hardly take some direction of its group still needs an inverse of T there:
# singular values of T are no less than this part of the largest.
LEAST_SINGULAR = 1e-3


@torch.no_grad()
def to_gqa(
    attention: MultiHeadAttention, num_kv_heads: int, statistics: LayerStatistics | None = None
) -> GroupedQueryAttention:
    """Multi-head attention with its heads in groups, each of which shares one key/value head.

    With statistics, errors count as they show in the attention output (`metric.OutputMetric`);
    without, as they show in weights.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: num_kv_heads does not divide the heads.
    """
    new = successor(attention, GroupedQueryAttention, num_kv_heads=num_kv_heads)
    if num_kv_heads == attention.h:
        return new
    h, d_k = attention.h, attention.d_k
    keys, values = head_rows(attention.linear_k.weight, h), head_rows(attention.linear_v.weight, h)
    if statistics is None:
        metric, mean = OutputMetric.flat(attention), keys.new_zeros(h, keys.size(-1))
    else:
        metric, mean = OutputMetric.of(attention, statistics), statistics.pooled_mean
    groups = choose_groups(*metric.weigh(keys, values), num_kv_heads)
    order = [head for group in groups for head in group]
    shared_k, turn_k = _share(groups, keys, metric.left_k, metric.right_k)
    shared_v, turn_v = _share(groups, values, metric.left_v, metric.right_v)
    if attention.rel_pos:
        turn_k = _invertible(turn_k)

    new.linear_k.weight.copy_(shared_k.flatten(0, 1))
    new.linear_k.bias.zero_()
    for name in ("linear_q.weight", "linear_q.bias", "pos_bias_u", "pos_bias_v"):
        if attention.rel_pos or name.startswith("linear"):
            tensor = attention.get_parameter(name)
            turned = turn_k.transpose(1, 2) @ tensor.double().reshape(h, d_k, -1)[order]
            new.get_parameter(name).copy_(turned.reshape(tensor.shape))
    if attention.rel_pos:
        position = head_rows(attention.linear_pos.weight, h)[order]
        new.linear_pos.weight.copy_(torch.linalg.solve(turn_k, position).flatten(0, 1))

    new.linear_v.weight.copy_(shared_v.flatten(0, 1))
    new.linear_v.bias.zero_()
    out = head_rows(attention.linear_out.weight.T, h).transpose(1, 2)[order]  # (H, D, d_k)
    new.linear_out.weight.copy_((out @ turn_v).transpose(0, 1).flatten(1))
    # weights sum to one: the bias of the values, and their mean error, pass through
    given = turn_v @ shared_v.repeat_interleave(h // num_kv_heads, dim=0)
    passed = torch.einsum("hij,hj->hi", values[order] - given, mean[order])
    passed += head_rows(attention.linear_v.bias[:, None], h)[order, :, 0]
    bias = attention.linear_out.bias.double() + torch.einsum("hij,hj->i", out, passed)
    new.linear_out.bias.copy_(bias)
    return new


def _share(
    groups: Sequence[Sequence[int]], maps: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """One map for the heads of each group, and how each of them reads it.

    Args:
        maps: (H, d_k, D). left, right: of the metric, (H, d_k, d_k) and (H, D, D).

    Returns:
        shared (G, d_k, D) and turns (H, d_k, d_k), heads in the order of the groups, with
        turns @ shared close to the maps.
    """
    d_k = maps.size(1)
    all_shared, all_turns = [], []
    for group in groups:
        of, root = maps[group], right[group]
        shared = best_rows(left[group] @ of, root @ root, d_k)
        turns = best_ups(of, root, shared)
        # the basis in which the turns are closest to orthogonal: it is ours to choose
        scale = symmetric_root((turns.transpose(1, 2) @ turns).mean(dim=0))
        all_shared.append(scale @ shared)
        all_turns.append(turns @ torch.linalg.pinv(scale))
    return torch.stack(all_shared), torch.cat(all_turns)


def _invertible(turns: Tensor) -> Tensor:
    """(n, d_k, d_k) with singular values raised to LEAST_SINGULAR of the largest."""
    u, s, vh = torch.linalg.svd(turns)
    least = LEAST_SINGULAR * float(s.max()) or 1.0
    return (u * s.clamp(min=least)[:, None, :]) @ vh


def choose_groups(keys: Tensor, values: Tensor, groups: int) -> list[list[int]]:
    """Which heads share, so that the least is lost when each group keeps d_k directions.

    Args:
        keys, values: (H, d_k, n), each head's map in the norm that its errors count in.

    Returns:
        G lists of H / G heads. Found by swapping pairs while that helps, from neighbours on.
    """
    heads, d_k, _ = keys.shape
    share = heads // groups
    lost: dict[tuple[int, ...], float] = {}

    def cost(group: Sequence[int]) -> float:
        key = tuple(sorted(group))
        if key not in lost:
            tails = [
                torch.linalg.svdvals(part[list(key)].flatten(0, 1))[d_k:].square().sum()
                for part in (keys, values)
            ]
            lost[key] = float(sum(tails))
        return lost[key]

    chosen = [list(range(first, first + share)) for first in range(0, heads, share)]
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(groups), 2):
            for i, j in product(range(share), repeat=2):
                before = cost(chosen[a]) + cost(chosen[b])
                one, other = chosen[a].copy(), chosen[b].copy()
                one[i], other[j] = other[j], one[i]
                if cost(one) + cost(other) < before * (1 - 1e-9):
                    chosen[a], chosen[b], improved = one, other, True
    return [sorted(group) for group in chosen]
