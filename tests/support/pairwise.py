"""Pairwise test cases: every pair of values of two factors occurs in some case."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def pairwise(**factors: Mapping[str, Any] | Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test with pairwise cases.

    Greedy: each case takes the values with the most new pairs.

    Args:
        factors: name of an argument -> its values, or id -> value.
    """
    named = {
        name: dict(values) if isinstance(values, Mapping) else {str(v): v for v in values}
        for name, values in factors.items()
    }
    names = list(named)
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(names, 2)
        for x in named[a]
        for y in named[b]
    }
    cases = [{names[0]: value} for value in named[names[0]]] if len(names) == 1 else []
    while missing:
        case = dict(sorted(min(missing, key=sorted)))
        for name in names:
            if name not in case:
                case[name] = max(
                    named[name],
                    key=lambda value, name=name, case=case: sum(
                        frozenset(((name, value), taken)) in missing for taken in case.items()
                    ),
                )
        missing -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        cases.append(case)
    parameters = [
        pytest.param(*(named[n][case[n]] for n in names), id="-".join(case[n] for n in names))
        for case in cases
    ]
    return pytest.mark.parametrize(names, parameters)
