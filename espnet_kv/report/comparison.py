"""The models of a report: order, names, colours, and the settings in which they differ."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from espnet_kv.profile.schema import Profile
from espnet_kv.report.seeds import by_model, mean_of
from espnet_kv.scores import RESAMPLES, SEED

# Okabe and Ito's palette, which colour-blind readers can tell apart, on dark ground too
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a68c9", "#a6761d", "#56b4e9", "#8a8a00")
MARKERS = ("o", "s", "D", "^", "P", "X", "v", "*")
# these keep their place and marker in every report; others follow by name
ENCODERS = ("conformer", "branchformer", "e_branchformer", "transformer")
ORIGINS = {
    "trained": "trained from scratch",
    "converted": "converted",
    "fine-tuned": "converted and fine-tuned",
}

# keys of the settings that must agree for figures to be comparable
COMPARED = (
    *("device", "device_name", "dtype", "threads", "commit", "chunk_size", "left_chunks"),
    *("cache_dtype", "longest_seconds", "audio", "search", "streaming_search", "torch"),
    "memory_method",
)


@dataclass(frozen=True, eq=False)
class Entry:
    """One model of the report.

    profile: its measurements; of several trainings their mean.
    runs: each of its trainings, by seed.
    name: unique in the report.
    colour: of its attention_type.
    marker: of its encoder, as matplotlib names it.
    """

    profile: Profile
    name: str
    colour: str
    marker: str
    runs: Sequence[Profile]

    @property
    def encoder(self) -> str:
        """conformer, ..."""
        return self.profile.model.encoder

    @property
    def origin(self) -> str:
        """trained, converted or fine-tuned."""
        return origin(self.profile)

    @property
    def short(self) -> str:
        """The name without that of the encoder."""
        return self.name.removeprefix(f"{self.encoder} ")


@dataclass(frozen=True)
class Notes:
    """What all rows of a table have in common, and remarks on single rows.

    shared: setting -> the value that all rows have.
    texts: the notes, numbered from 1.
    marks: for each row the numbers of its notes.
    """

    shared: dict[str, str]
    texts: list[str] = field(default_factory=list)
    marks: list[list[int]] = field(default_factory=list)


def entries(profiles: Sequence[Profile]) -> list[Entry]:
    """The models by encoder, attention and origin, then the largest cache first.

    Trainings that differ in their seed alone are one model.
    """
    used = {profile.model.encoder for profile in profiles}
    encoders = [*ENCODERS, *sorted(used - set(ENCODERS))]
    slots = _colour_slots(profiles)

    def place(trained: tuple[Profile, Sequence[Profile]]) -> tuple[Any, ...]:
        profile = trained[0]
        model, cache = profile.model, profile.bounded()
        return (
            encoders.index(model.encoder),
            slots[model.attention_type],
            model.attention_type,
            list(ORIGINS).index(origin(profile)),
            -(cache.allocated.attention if cache else 0),
            profile.name,
        )

    models = sorted(((mean_of(runs), runs) for runs in by_model(profiles)), key=place)
    names = _names([profile for profile, _ in models])
    return [
        Entry(
            profile,
            name,
            PALETTE[slots[profile.model.attention_type] % len(PALETTE)],
            MARKERS[encoders.index(profile.model.encoder) % len(MARKERS)],
            runs,
        )
        for (profile, runs), name in zip(models, names, strict=True)
    ]


def _colour_slots(profiles: Sequence[Profile]) -> dict[str, int]:
    """attention_type -> its slot; types without one take the free ones in the order of names."""
    own = {
        profile.model.attention_type: profile.model.attention_colour_slot for profile in profiles
    }
    free = (slot for slot in itertools.count() if slot not in own.values())
    return {name: next(free) if slot is None else slot for name, slot in sorted(own.items())}


def by_encoder(models: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The models of each encoder, in their order."""
    found: dict[str, list[Entry]] = {}
    for entry in models:
        found.setdefault(entry.encoder, []).append(entry)
    return found


def origin(profile: Profile) -> str:
    """Where its weights come from: trained (from scratch), converted or fine-tuned (after that)."""
    source = profile.model.converted_from
    if source is None:
        return "trained"
    tuned = any(value for key, value in source.items() if key.startswith("finetune"))
    return "fine-tuned" if tuned else "converted"


def attention_name(profile: Profile) -> str:
    """Labels of the encoder's attention, and of the decoder's where it is not mha."""
    model = profile.model
    decoder = {"self": model.self_attention_label, "cross": model.src_attention_label}
    others = [f"{place} {label}" for place, label in decoder.items() if label not in (None, "mha")]
    return ", ".join([model.attention_label, *others])


def options(values: Mapping[str, Any]) -> str | None:
    """beam_size 10, ctc_weight 0.3; None where there are none."""
    return ", ".join(f"{key} {value}" for key, value in values.items()) or None


def _names(profiles: Sequence[Profile]) -> list[str]:
    """A short name for each; equal ones are told apart by device, weights or number."""
    names = []
    for profile in profiles:
        remark = "" if origin(profile) == "trained" else f" ({origin(profile)})"
        names.append(f"{profile.model.encoder} {attention_name(profile)}{remark}")
    for name in {name for name in names if names.count(name) > 1}:
        rows = [row for row, own in enumerate(names) if own == name]
        devices = [profiles[row].settings.device for row in rows]
        weights = [profiles[row].model.weights for row in rows]
        numbers = [f"#{n}" for n in range(1, len(rows) + 1)]
        words = next(w for w in (devices, weights, numbers) if len(set(w)) == len(rows))
        for row, word in zip(rows, words, strict=True):
            names[row] = f"{name} {word}"
    return names


def compare(models: Sequence[Entry], values: pd.DataFrame) -> Notes:
    """The settings that all models share, and a note for each row that differs from most.

    Args:
        values: a row per model, with the columns of COMPARED that are known.
    """
    notes = Notes(shared={}, marks=[[] for _ in models])

    def add(row: int, text: str) -> None:
        if text not in notes.texts:
            notes.texts.append(text)
        notes.marks[row].append(notes.texts.index(text) + 1)

    for row, entry in enumerate(models):
        if entry.profile.model.weights != "trained":
            add(row, f"{entry.profile.model.weights} weights: sizes and speed only, no error rates")
        if len(entry.runs) > 1:
            seeds = ", ".join(str(run.model.training_seed) for run in entry.runs)
            add(row, f"mean of the seeds {seeds}; error rates from the lowest to the highest")
    for key in (key for key in COMPARED if key in values):
        texts = [_text(value) for value in values[key]]
        usual = Counter(texts).most_common(1)[0][0]
        if len(set(texts)) == 1:
            notes.shared[key] = usual
        for row, own in enumerate(texts):
            if own != usual:
                add(row, f"{key} {own} instead of {usual}")
    single = [entry.profile for entry in models if len(entry.runs) == 1]
    rates = [r for profile in single for sets in profile.wer.values() for r in sets.values()]
    if any(r.wer_interval for r in rates):
        notes.shared["intervals"] = (
            f"95 %, by bootstrap over utterances ({RESAMPLES} resamples, seed {SEED})"
        )
    for row, entry in enumerate(models):
        lengths = [length for cache in entry.profile.cache.values() for length in cache.lengths]
        held = [one for length in lengths for one in (length.bounded, length.unbounded) if one]
        if any(one.bytes != one.analytic for one in held):
            add(row, "the measured cache differs from the computed one")
    return notes


def _text(value: Any) -> str:
    known = f"{value:g}" if isinstance(value, float) else str(value)
    return "not known" if value is None else known
