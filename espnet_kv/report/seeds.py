"""One row for several trainings of a model that differ in their seed alone."""

import re
from collections.abc import Hashable, Sequence
from typing import Any

from espnet_kv.profile.schema import Profile

OWN = {"experiment", "model_file", "training_seed"}
"""Keys of a model in which two trainings of it differ."""


def by_model(profiles: Sequence[Profile]) -> list[list[Profile]]:
    """Group the trainings of each model: by seed, in the order of the first of each.

    Two belong together if their names, models and settings are equal but for the seed.
    """
    groups: dict[Hashable, dict[int, Profile]] = {}
    for number, profile in enumerate(profiles):
        seed, key = profile.model.training_seed, _key(profile)
        if seed is None or seed in groups.get(key, {}):
            key, seed = (number,), 0
        groups.setdefault(key, {})[seed] = profile
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def mean_of(runs: Sequence[Profile]) -> Profile:
    """The mean of all numbers; the interval of an error rate is from the lowest to the highest.

    What is no number, or is not known of all, is that of the first; such an error rate is None.
    """
    if len(runs) == 1:
        return runs[0]
    content = _mean([run.model_dump(by_alias=True) for run in runs])
    content["model"]["training_seed"] = None
    for mode, sets in content["wer"].items():
        for name, rates in sets.items():
            for kind in ("wer", "cer"):
                known = [getattr(run.wer[mode][name], kind) for run in runs]
                if None in known:
                    rates[kind] = rates[f"{kind}_interval"] = None
                else:
                    rates[f"{kind}_interval"] = [min(known), max(known)]
    return Profile.model_validate(content)


def _key(profile: Profile) -> Hashable:
    model = profile.model.model_dump(exclude=OWN)
    settings = profile.settings.model_dump(exclude={"command", "date"})
    # the name says with which arguments it was trained
    return re.sub(r"seed[_=]?\d+", "seed", profile.name), repr(model), repr(settings)


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if all(isinstance(value, dict) for value in values):
        shared = [key for key in first if all(key in value for value in values)]
        return {key: _mean([value[key] for value in values]) for key in shared}
    if isinstance(first, list) and {len(value or ()) for value in values} == {len(first)}:
        return [_mean(each) for each in zip(*values, strict=True)]
    if any(value != first for value in values) and {type(v) for v in values} <= {int, float}:
        mean = sum(values) / len(values)
        return round(mean) if all(type(value) is int for value in values) else mean
    return first
