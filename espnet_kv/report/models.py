"""The models of a report: their order, their names, and what keeps two of them from comparing."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from espnet_kv.report.profiles import Profile

ENCODERS = ("conformer", "branchformer", "e_branchformer", "transformer")
ATTENTIONS = ("mha", "gqa", "mla", "linear")
PREFIX = {"kv_rank": "r", "num_kv_heads": "G"}
USUAL = {"feature_map": "elu", "cache": "kv", "decay": None}
ORIGINS = ("trained", "converted", "fine-tuned")

COMPARED: dict[str, Callable[[Profile], Any]] = {
    "device": lambda p: p.settings.device,
    "device name": lambda p: p.settings.device_name,
    "dtype": lambda p: p.settings.dtype,
    "threads": lambda p: p.settings.threads,
    "commit": lambda p: p.settings.commit,
    "chunk_size": lambda p: p.settings.chunk_size,
    "left_chunks": lambda p: p.settings.left_chunks,
    "cache_dtype": lambda p: p.cache_dtype,
    "longest audio": lambda p: _longest(p),
    "audio": lambda p: p.settings.audio,
    "search": lambda p: options(p.settings.search),
    "streaming search": lambda p: options(p.settings.streaming_search),
    "torch": lambda p: p.settings.torch,
    "memory measured as": lambda p: p.memory.method,
}
"""What has to agree for figures to compare, by the name it has in notes."""


@dataclass(frozen=True)
class Notes:
    """What the rows of a table share, and what is said of single ones.

    shared: setting -> the value that all rows have, where they have one.
    texts: the notes, numbered from 1.
    marks: for each row the numbers of its notes.
    """

    shared: dict[str, str]
    texts: list[str] = field(default_factory=list)
    marks: list[list[int]] = field(default_factory=list)


def ordered(profiles: Sequence[Profile]) -> list[Profile]:
    """By encoder, attention and origin, then the largest cache first."""

    def place(profile: Profile) -> tuple:
        allocated, model = profile.allocated(), profile.model
        return (
            *_rank(ENCODERS, model.encoder),
            *_rank(ATTENTIONS, model.attention_type),
            ORIGINS.index(origin(profile)),
            -(allocated.attention if allocated else 0),
            profile.name,
        )

    return sorted(profiles, key=place)


def origin(profile: Profile) -> str:
    """Where its weights come from: trained (as it is), converted or fine-tuned (after that)."""
    source = profile.model.converted_from
    if source is None:
        return "trained"
    tuned = any(value for key, value in source.items() if key.startswith("finetune"))
    return "fine-tuned" if tuned else "converted"


def attention_name(profile: Profile) -> str:
    """mla r64, gqa G2: the encoder's attention, and the decoder's where they are not mha."""
    model = profile.model
    words = [_attention(model.attention_type, model.attention_conf)]
    for place, kind, conf in (
        ("self", model.self_attention_type, model.self_attention_conf),
        ("cross", model.src_attention_type, model.src_attention_conf),
    ):
        if kind not in (None, "mha"):
            words.append(f"{place} {_attention(kind, conf)}")
    return ", ".join(words)


def _attention(kind: str, conf: Mapping[str, Any]) -> str:
    """An attention with what of its options is not usual."""
    words = [kind]
    for key, value in conf.items():
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            low, high = min(value), max(value)  # one for each layer
            value = low if low == high else f"{low}-{high}"
        if key in PREFIX:
            words.append(f"{PREFIX[key]}{value}")
        elif key not in USUAL or USUAL[key] != value:
            words.append(f"{key} {value}")
    return " ".join(words)


def options(values: Mapping[str, Any]) -> str | None:
    """beam_size 10, ctc_weight 0.3; None where there are none."""
    return ", ".join(f"{key} {value}" for key, value in values.items()) or None


def names(profiles: Sequence[Profile]) -> list[str]:
    """A short name for each, told apart by device, weights or number where need be."""
    given: dict[str, list[int]] = {}
    for n, profile in enumerate(profiles):
        source = origin(profile)
        said = f" ({source})" if source != "trained" else ""
        name = f"{profile.model.encoder} {attention_name(profile)}{said}"
        given.setdefault(name, []).append(n)
    found = [""] * len(profiles)
    for name, rows in given.items():
        numbers = [f"#{n}" for n in range(1, len(rows) + 1)]
        devices = [profiles[row].settings.device for row in rows]
        weights = [profiles[row].model.weights for row in rows]
        apart = next(said for said in (devices, weights, numbers) if len({*said}) == len(rows))
        for row, word in zip(rows, apart, strict=True):
            found[row] = f"{name} {word}" if len(rows) > 1 else name
    return found


def compare(profiles: Sequence[Profile]) -> Notes:
    """What all have in common, and a note for every row that differs from most others."""
    notes = Notes(shared={}, marks=[[] for _ in profiles])

    def add(row: int, text: str) -> None:
        if text not in notes.texts:
            notes.texts.append(text)
        notes.marks[row].append(notes.texts.index(text) + 1)

    for row, profile in enumerate(profiles):
        if profile.model.weights != "trained":
            add(row, f"{profile.model.weights} weights: sizes and speed only, no error rates")
    for name, value in COMPARED.items():
        found = [value(profile) for profile in profiles]
        usual = Counter(found).most_common(1)[0][0]
        if len(set(found)) == 1:
            if usual is not None:
                notes.shared[name] = str(usual)
            continue
        for row, own in enumerate(found):
            if own != usual:
                add(row, f"{name} {_said(own)} instead of {_said(usual)}")
    for row, profile in enumerate(profiles):
        if not _agrees(profile):
            add(row, "the measured cache is not what the formula gives")
    return notes


def _rank(known: Sequence[str], name: str) -> tuple[int, str]:
    return (known.index(name) if name in known else len(known)), name


def _longest(profile: Profile) -> str | None:
    lengths = [cache.longest.seconds for cache in profile.cache.values() if cache.longest]
    return f"{max(lengths):g} s" if lengths else None


def _said(value: Any) -> str:
    return "not known" if value is None else str(value)


def _agrees(profile: Profile) -> bool:
    return all(
        held is None or held.analytic is None or held.analytic == held.bytes
        for cache in profile.cache.values()
        for length in cache.lengths
        for held in (length.bounded, length.unbounded)
    )
