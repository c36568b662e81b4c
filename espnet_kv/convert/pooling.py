"""Conversion of multi-head attention to grouped-query attention (arXiv 2305.13245).

All query heads of a group use the same keys and values. The keys of a head may be expressed in
another basis, K = T K', if its queries are transformed too, q' = T' q (T' q . K' = q . T K'). The
same holds for values and the output projection. The heads of a group therefore need not be
similar: the shared keys are the best d_k directions of the keys of all its heads, and likewise
for values. The position term (q + pos_bias_v) . W_pos p has the same queries; replacing W_pos by
T^-1 W_pos keeps it exactly.

Shape letters: H heads, G key/value heads, D model size, d_k head size.
"""

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from espnet_kv.attention.grouped import GroupedQueryAttention, MultiHeadAttention
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import head_rows, replacement_module
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.subspace import best_rows, best_ups

# Smallest singular value of T, relative to the largest. T must be invertible, even if the keys of
# a head hardly use some direction of its group.
LEAST_SINGULAR = 1e-3


@torch.no_grad()
def to_gqa(
    attention: MultiHeadAttention, num_kv_heads: int, statistics: LayerStatistics | None = None
) -> GroupedQueryAttention:
    """Convert to grouped-query attention: each group of heads shares one key/value head.

    With statistics, the error of the attention output (`metric.OutputMetric`) is minimised;
    without, the Frobenius norm of the weight errors.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: num_kv_heads does not divide the heads.
    """
    new = replacement_module(attention, GroupedQueryAttention, num_kv_heads=num_kv_heads)
    if num_kv_heads == attention.h:
        return new
    h, d_k = attention.h, attention.d_k
    keys, values = head_rows(attention.linear_k.weight, h), head_rows(attention.linear_v.weight, h)
    if statistics is None:
        metric, mean = OutputMetric.frobenius(attention), keys.new_zeros(h, keys.size(-1))
    else:
        metric, mean = OutputMetric.of(attention, statistics), statistics.pooled_mean
    groups = choose_groups(*metric.with_common_inputs().weigh(keys, values), num_kv_heads)
    order = [head for group in groups for head in group]
    shared_k, transform_k = _share(groups, keys, metric.left_k, metric.right_k)
    shared_v, transform_v = _share(groups, values, metric.left_v, metric.right_v)
    if attention.rel_pos:
        transform_k = _invertible(transform_k)

    new.linear_k.weight.copy_(shared_k.flatten(0, 1))
    new.linear_k.bias.zero_()
    for name in ("linear_q.weight", "linear_q.bias", "pos_bias_u", "pos_bias_v"):
        if attention.rel_pos or name.startswith("linear"):
            tensor = attention.get_parameter(name)
            transformed = transform_k.transpose(1, 2) @ tensor.double().reshape(h, d_k, -1)[order]
            new.get_parameter(name).copy_(transformed.reshape(tensor.shape))
    if attention.rel_pos:
        position = head_rows(attention.linear_pos.weight, h)[order]
        new.linear_pos.weight.copy_(torch.linalg.solve(transform_k, position).flatten(0, 1))

    new.linear_v.weight.copy_(shared_v.flatten(0, 1))
    new.linear_v.bias.zero_()
    out = head_rows(attention.linear_out.weight.T, h).transpose(1, 2)[order]  # (H, D, d_k)
    new.linear_out.weight.copy_((out @ transform_v).transpose(0, 1).flatten(1))
    # attention weights sum to one, so the output bias can include value bias and mean error
    approximated = transform_v @ shared_v.repeat_interleave(h // num_kv_heads, dim=0)
    passed = torch.einsum("hij,hj->hi", values[order] - approximated, mean[order])
    passed += head_rows(attention.linear_v.bias[:, None], h)[order, :, 0]
    bias = attention.linear_out.bias.double() + torch.einsum("hij,hj->i", out, passed)
    new.linear_out.bias.copy_(bias)
    return new


def _share(
    groups: Sequence[Sequence[int]], maps: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """One shared projection for each group, and a transform of it for each head.

    Args:
        maps: (H, d_k, D). left, right: of the metric, (H, d_k, d_k) and (H, D, D).

    Returns:
        shared (G, d_k, D) and transforms (H, d_k, d_k), heads in the order of the groups, with
        transforms @ shared close to the maps.
    """
    d_k = maps.size(1)
    all_shared, all_transforms = [], []
    for group in groups:
        of, root = maps[group], right[group]
        shared = best_rows(left[group] @ of, root @ root, d_k)
        transforms = best_ups(of, root, shared)
        # the basis is arbitrary: take the one in which the transforms are closest to orthogonal
        scale = symmetric_root((transforms.transpose(1, 2) @ transforms).mean(dim=0))
        all_shared.append(scale @ shared)
        all_transforms.append(transforms @ torch.linalg.pinv(scale))
    return torch.stack(all_shared), torch.cat(all_transforms)


def _invertible(transforms: Tensor) -> Tensor:
    """Raise small singular values of (n, d_k, d_k) to LEAST_SINGULAR times the largest."""
    u, s, vh = torch.linalg.svd(transforms)
    least = LEAST_SINGULAR * float(s.max()) or 1.0
    return (u * s.clamp(min=least)[:, None, :]) @ vh


def choose_groups(keys: Tensor, values: Tensor, groups: int) -> list[list[int]]:
    """Choose the groups of heads with the smallest error of d_k shared directions per group.

    Args:
        keys, values: (H, d_k, n), weighted projections of each head (`OutputMetric.weigh`).

    Returns:
        G lists of H / G heads, by a local search that swaps pairs, from adjacent heads on.
    """
    heads, d_k, _ = keys.shape
    share = heads // groups
    errors: dict[tuple[int, ...], float] = {}

    def cost(group: Sequence[int]) -> float:
        key = tuple(sorted(group))
        if key not in errors:
            tails = [
                torch.linalg.svdvals(part[list(key)].flatten(0, 1))[d_k:].square().sum()
                for part in (keys, values)
            ]
            errors[key] = float(sum(tails))
        return errors[key]

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
