"""Allocation of a budget to layers."""

from itertools import pairwise, product

import pytest
from layers import SIZE, Source, layer

from espnet_kv.convert.budget import choose_ranks, lower_hull, predicted_errors
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.errors import UserError

EFFECTS = {"a": 1.0, "b": 5.0, "c": 0.1}


@pytest.fixture
def layers(rng):
    """Predicted errors of three layers, weighted by EFFECTS."""
    found = {}
    for name, effect in EFFECTS.items():
        attention = layer()
        known = LayerStatistics.of(attention, Source(rng).calls(4))
        found[name] = [effect * error for error in predicted_errors(attention, known)]
    return found


def total(layers, ranks) -> float:
    """Sum of the errors, as minimised by `choose_ranks`."""
    return sum(layers[name][rank] for name, rank in ranks.items())


@pytest.mark.parametrize("budget", [3, 7, 14, 24, 47])
def test_no_other_ranks_have_less_error(layers, budget):
    ranks = choose_ranks(layers, budget)
    assert sum(ranks.values()) == budget and all(1 <= r <= SIZE for r in ranks.values())
    best = min(
        total(layers, dict(zip(layers, other, strict=True)))
        for other in product(range(1, SIZE + 1), repeat=3)
        if sum(other) <= budget
    )
    assert total(layers, ranks) == pytest.approx(best)
    uniform = dict.fromkeys(layers, budget // 3)
    assert total(layers, ranks) <= total(layers, uniform) * (1 + 1e-9)


def test_more_budget_lowers_no_rank(layers):
    before = choose_ranks(layers, 3)
    assert set(before.values()) == {1}
    for budget in range(4, 3 * SIZE + 1):
        after = choose_ranks(layers, budget)
        assert all(after[name] >= before[name] for name in layers)
        before = after
    assert set(before.values()) == {SIZE}
    assert choose_ranks(layers, 1000) == before


def test_a_budget_too_small_is_refused(layers):
    with pytest.raises(UserError, match="too small for 3 layers"):
        choose_ranks(layers, 2)


def test_predicted_errors_are_convex_and_fall_to_zero(layers):
    errors = layers["a"]
    assert len(errors) == SIZE + 1 and errors[-1] == pytest.approx(0, abs=1e-9)
    gains = [a - b for a, b in pairwise(errors)]
    assert all(a >= b - 1e-12 for a, b in pairwise(gains))


def test_lower_hull():
    hull = [8.0, 5.0, 2.0, 4 / 3, 2 / 3, 0.0]
    assert lower_hull([8.0, 7.0, 2.0, 1.5, 1.0, 0.0]) == pytest.approx(hull)
    assert lower_hull([3.0]) == [3.0]
