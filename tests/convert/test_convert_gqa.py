"""Conversion to grouped-query attention: exact cases, and comparison with mean pooling."""

from itertools import combinations

import pytest
import torch
from layers import HEADS, SIZE, Source, layer, outputs, permuted

from espnet_kv.attention.grouped import GroupedQueryAttention
from espnet_kv.convert.layer_error import output_error
from espnet_kv.convert.modules import replacement_module
from espnet_kv.convert.pooling import choose_groups, to_gqa
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.errors import ConfigError, UserError

D_K = SIZE // HEADS
KINDS = {
    "rel": {"rel_pos": True},
    "abs-chunks": {"rel_pos": False, "chunked": True},
    "rel-chunks": {"rel_pos": True, "chunked": True},
    "cross": {"rel_pos": False, "cross": True},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def prepare(rng, kind):
    attention, source = layer(kind["rel_pos"]), Source(rng)
    fitted, unseen = source.calls(16, **kind), source.calls(6, **kind)
    return attention, LayerStatistics.of(attention, fitted), unseen


@torch.no_grad()
def mean_pooled(attention, num_kv_heads: int) -> GroupedQueryAttention:
    """The baseline (arXiv 2305.13245): keys and values of adjacent heads are averaged."""
    new = replacement_module(attention, GroupedQueryAttention, num_kv_heads=num_kv_heads)
    for name in ("linear_k.weight", "linear_k.bias", "linear_v.weight", "linear_v.bias"):
        width = SIZE if "w" in name else 1
        heads = attention.get_parameter(name).view(num_kv_heads, -1, D_K, width)
        new.get_parameter(name).copy_(heads.mean(dim=1).reshape(new.get_parameter(name).shape))
    return new


@torch.no_grad()
def share_in_other_bases(attention, groups: list[list[int]]) -> None:
    """Give the heads of each group the same keys and values, each in another basis."""
    k, v = (
        linear.weight.view(HEADS, D_K, SIZE) for linear in (attention.linear_k, attention.linear_v)
    )
    for group in groups:
        for weights in (k, v):
            common = torch.randn(D_K, SIZE, dtype=torch.float64)
            for head in group:
                weights[head] = torch.randn(D_K, D_K, dtype=torch.float64) @ common


@kinds
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "weights"])
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1, 2, 3]]], ids=str)
def test_shared_heads_are_found_whatever_their_basis_and_order(rng, kind, groups, calibrated):
    """Such a conversion has no error, including the position term."""
    attention, _, unseen = prepare(rng, kind)
    share_in_other_bases(attention, groups)
    fitted = Source(rng).calls(4, **kind)
    statistics = LayerStatistics.of(attention, fitted) if calibrated else None
    new = to_gqa(attention, len(groups), statistics)
    torch.testing.assert_close(
        outputs(new, unseen), outputs(attention, unseen), rtol=1e-4, atol=1e-4
    )


@kinds
def test_a_key_value_head_for_every_head_changes_nothing(rng, kind):
    attention, statistics, unseen = prepare(rng, kind)
    for given in (None, statistics):
        new = to_gqa(attention, HEADS, given)
        assert torch.equal(outputs(new, unseen), outputs(attention, unseen))


@kinds
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_error_on_held_out_inputs_is_lower_than_by_averaging(rng, kind, num_kv_heads):
    attention, statistics, unseen = prepare(rng, kind)
    fitted = output_error(attention, to_gqa(attention, num_kv_heads, statistics), unseen)
    by_weights = output_error(attention, to_gqa(attention, num_kv_heads), unseen)
    averaged = output_error(attention, mean_pooled(attention, num_kv_heads), unseen)
    assert fitted < 0.6 * by_weights and fitted < 0.6 * averaged


@kinds
def test_heads_in_another_order_give_the_same(rng, kind):
    attention, statistics, unseen = prepare(rng, kind)
    other = permuted(attention, [2, 0, 3, 1])
    again = LayerStatistics.of(other, statistics.calls)
    given = output_error(attention, to_gqa(attention, 2, statistics), unseen)
    assert output_error(attention, to_gqa(other, 2, again), unseen) == pytest.approx(
        given, rel=0.01
    )


def test_a_dead_direction_of_a_head_keeps_its_position_term(rng):
    """The keys of one head have no part in some direction of their group: T is singular."""
    attention, _, unseen = prepare(rng, KINDS["rel"])
    share_in_other_bases(attention, [[0, 1], [2, 3]])
    with torch.no_grad():
        attention.linear_k.weight[:2] = 0.0  # two of the four keys of head 0
    new = to_gqa(attention, 2)
    assert outputs(new, unseen).isfinite().all()
    assert output_error(attention, new, unseen) < 0.05


@torch.no_grad()
def test_the_mean_error_of_values_is_in_the_output_bias(rng):
    attention, statistics, _ = prepare(rng, KINDS["rel"])
    with torch.no_grad():
        attention.linear_k.weight.zero_()  # weights depend on positions only: they do not change
    statistics = LayerStatistics.of(attention, statistics.calls)
    new = to_gqa(attention, 1, statistics)
    diff = outputs(new, statistics.calls) - outputs(attention, statistics.calls)
    assert diff.square().mean() > 1e-3
    torch.testing.assert_close(diff.mean(dim=0), torch.zeros(SIZE).double(), rtol=0, atol=1e-6)


def test_groups_are_the_best_of_all(rng):
    for _ in range(10):
        keys, values = torch.randn(2, 4, 3, 10, dtype=torch.float64, generator=rng)

        def cost(group, keys=keys, values=values):
            return sum(
                float(torch.linalg.svdvals(part[list(group)].flatten(0, 1))[3:].square().sum())
                for part in (keys, values)
            )

        pairs = [(pair, tuple({0, 1, 2, 3} - set(pair))) for pair in combinations(range(4), 2)]
        best = min(cost(a) + cost(b) for a, b in pairs)
        a, b = choose_groups(keys, values, 2)
        assert sorted(a + b) == [0, 1, 2, 3]
        assert cost(a) + cost(b) == pytest.approx(best)


def test_impossible_conversions_are_refused():
    with pytest.raises(ConfigError, match="num_kv_heads"):
        to_gqa(layer(), 3)
    with pytest.raises(UserError, match="qk_norm"):
        to_gqa(layer(rel_pos=False, qk_norm=True), 2)
