"""Multi-head attention with fewer key/value heads: grouped-query attention.

Query heads of one group read the same keys and values. A head's keys may be put into another
basis, K = T K', when its queries follow, q' = T' q (T' q . K' = q . T K'), and so may its values
when the output projection follows. So a group needs no likeness of its heads as they stand: its
keys are the best d_k directions of all its heads' keys together, and the same for values.
Relative positions meet the same queries in (q + pos_bias_v) . W_pos p: T^-1 W_pos leaves that as
it was, exactly.

Shape letters: H heads, G key/value heads, D model size, d_k head size.
"""

import math
from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from espnet_kv.attention.gqa import GroupedQueryAttention
from espnet_kv.attention.mha import MultiHeadAttention
from espnet_kv.convert.factorize import left_vectors
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.modules import head_rows, successor
from espnet_kv.convert.statistics import LayerStatistics

# A head whose keys hardly take some direction of its group still needs an inverse of T there:
# singular values of T are no less than this part of the largest.
LEAST_SINGULAR = 1e-3


def to_gqa(
    attention: MultiHeadAttention, num_kv_heads: int, statistics: LayerStatistics | None = None
) -> GroupedQueryAttention:
    """Multi-head attention with its heads in groups, each of which shares one key/value head.

    Raises:
        UserError: keys are normalised (qk_norm).
        ConfigError: num_kv_heads does not divide the heads.
    """
    new = successor(attention, GroupedQueryAttention, num_kv_heads=num_kv_heads)
    if num_kv_heads == attention.h:
        return new
    h, d_k = attention.h, attention.d_k
    keys, values = head_rows(attention.linear_k.weight, h), head_rows(attention.linear_v.weight, h)
    out = head_rows(attention.linear_out.weight.T, h).transpose(1, 2)  # (H, D, d_k)
    out_root = symmetric_root(out.transpose(1, 2) @ out)
    if statistics is None:
        root_k = root_v = torch.eye(keys.size(-1), dtype=keys.dtype, device=keys.device)
        query_root = torch.eye(d_k, dtype=keys.dtype, device=keys.device).expand(h, -1, -1)
        mean = keys.new_zeros(h, keys.size(-1))
    else:
        root_k = root_v = symmetric_root(statistics.covariance)
        query_root = symmetric_root(statistics.query_moment) / math.sqrt(d_k)
        mean = statistics.pooled_mean
    met_keys, met_values = query_root @ keys @ root_k, out_root @ values @ root_v
    met_keys = met_keys * met_values.norm() / met_keys.norm().clamp(min=1e-300)
    groups = choose_groups(met_keys, met_values, num_kv_heads)

    order = [head for group in groups for head in group]
    shared_k, shared_v, turn_k, turn_v = [], [], [], []
    for group in groups:
        shared, turns = _share(query_root[group] @ keys[group], keys[group], root_k)
        shared_k.append(shared)
        turn_k.append(_invertible(turns) if attention.rel_pos else turns)
        shared, turns = _share(out_root[group] @ values[group], values[group], root_v)
        shared_v.append(shared)
        turn_v.append(turns)
    t, r = torch.cat(turn_k), torch.cat(turn_v)  # (H, d_k, d_k), heads in their new order
    given = torch.stack(shared_v).repeat_interleave(h // num_kv_heads, dim=0)  # (H, d_k, D)
    lost = torch.einsum("hij,hj->hi", values[order] - r @ given, mean[order])
    v_bias = head_rows(attention.linear_v.bias[:, None], h)[order, :, 0] + lost
    with torch.no_grad():
        new.linear_k.weight.copy_(torch.cat(shared_k))
        new.linear_v.weight.copy_(torch.cat(shared_v))
        new.linear_k.bias.zero_()
        new.linear_v.bias.zero_()
        for name in ("linear_q.weight", "linear_q.bias", "pos_bias_u", "pos_bias_v"):
            if attention.rel_pos or name.startswith("linear"):
                tensor = attention.get_parameter(name)
                turned = t.transpose(1, 2) @ tensor.double().reshape(h, d_k, -1)[order]
                new.get_parameter(name).copy_(turned.reshape(tensor.shape))
        if attention.rel_pos:
            position = head_rows(attention.linear_pos.weight, h)[order]
            new.linear_pos.weight.copy_(torch.linalg.solve(t, position).flatten(0, 1))
        new.linear_out.weight.copy_((out[order] @ r).transpose(0, 1).flatten(1))
        passed = torch.einsum("hij,hj->i", out[order], v_bias)
        new.linear_out.bias.copy_(attention.linear_out.bias.double() + passed)
    return new


def _share(weighted: Tensor, plain: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """One d_k-dimensional map for the heads of a group, and how each reads it.

    Args:
        weighted: (n, d_k, D), the maps times what meets their outputs. plain: the maps. root:
            (D, D), of the moment of their inputs.

    Returns:
        shared (d_k, D) and turns (n, d_k, d_k) with turns @ shared close to plain.
    """
    d_k = plain.size(1)
    stacked = weighted.flatten(0, 1)
    shared = left_vectors(stacked @ root, d_k).T @ stacked
    turns = plain @ root @ torch.linalg.pinv(shared @ root)
    # the basis in which the turns are closest to orthogonal: it is ours to choose
    scale = symmetric_root(turns.transpose(1, 2).matmul(turns).mean(dim=0))
    return scale @ shared, turns @ torch.linalg.inv(scale)


def _invertible(turns: Tensor) -> Tensor:
    """(n, d_k, d_k) with singular values raised to LEAST_SINGULAR of the largest."""
    u, s, vh = torch.linalg.svd(turns)
    return (u * s.clamp(min=LEAST_SINGULAR * float(s.max()))[:, None, :]) @ vh


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
