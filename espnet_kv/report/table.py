"""The tables of a report: their columns, and the comparison as CSV, Markdown and plain text."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from espnet_kv import files
from espnet_kv.profile.schema import Profile, Settings
from espnet_kv.report.comparison import Entry, Notes, attention_name, options, origin
from espnet_kv.scores import MISSING, interval_text

Value = str | float | None
THIN_SPACE = "\u2009"
SCALES = {"kB": 1e-3, "MB": 1e-6, "million": 1e-6, "million per second of audio": 1e-6}


@dataclass(frozen=True)
class Column:
    """One property of all models.

    key: its name in comparison.csv, where base units are used (bytes, ms, per cent).
    title: its heading in tables for people.
    value: the property of one profile in base units, None where it is not known.
    unit: in tables for people.
    bound: whether it bounds the interval of another column, beside whose value people read it.
    """

    key: str
    title: str
    value: Callable[[Profile], Value]
    unit: str = ""
    bound: bool = False

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Table:
    """The known ones of some columns.

    title: its heading.
    values: one row per model, one column per key, in base units; None is unknown.
    columns: what the keys stand for, but for bounds of intervals.
    """

    title: str
    values: pd.DataFrame
    columns: list[Column]

    @property
    def anchor(self) -> str:
        """The title as an identifier: memory_and_computation."""
        return self.title.lower().replace(" ", "_")

    def shown(self) -> pd.DataFrame:
        """The values as text for people, under the columns' keys."""
        cells = {c.key: _shown(self.values[c.key], c.unit) for c in self.columns}
        for key, texts in cells.items():
            if (low := f"{key}_low") in self.values:
                bounds = zip(self.values[low], self.values[f"{key}_high"], strict=True)
                cells[key] = [
                    text if pd.isna(pair[0]) else f"{text} ({interval_text(pair)})"
                    for text, pair in zip(texts, bounds, strict=True)
                ]
        return pd.DataFrame(cells, index=self.values.index, dtype=object)

    def is_numeric(self, column: Column) -> bool:
        """Whether a column holds numbers."""
        return not any(isinstance(value, str) for value in self.values[column.key])


def tables(models: Sequence[Entry]) -> list[Table]:
    """Everything that is known by subject, the overview first; unknown columns are left out."""
    profiles = [entry.profile for entry in models]
    rates = _error_rates(profiles, "wer")
    subjects = {
        "Cache": _cache(profiles),
        "Decoder cache": _decoder(),
        "Time": _time(),
        "Streaming engines": _engines(profiles),
        "Memory and computation": _memory(),
        "Error rates": [*rates, *_error_rates(profiles, "cer")],
        "Settings": _settings(),
    }
    by_key = {column.key: column for columns in subjects.values() for column in columns}
    overview = [
        *("cache_attention_allocated", "compression_mha", *(column.key for column in rates)),
        *("bytes_per_second", "cache_rest_allocated", "streams_per_gib"),
        *(
            "utterance_ms_mean",
            "rtf",
            "chunk_ms_p50",
            "streaming_rtf",
            "offline_bytes",
            "streaming_bytes",
        ),
    ]
    names = pd.Index([entry.name for entry in models], name="model")
    found = []
    for title, columns in {"Overview": [by_key[key] for key in overview], **subjects}.items():
        cells = {c.key: [c.value(profile) for profile in profiles] for c in columns}
        values = pd.DataFrame(cells, index=names, dtype=object).dropna(axis=1, how="all")
        if len(values.columns) or title == "Overview":
            known = [c for c in columns if c.key in values and not c.bound]
            found.append(Table(title, values, known))
    return found


def _shown(values: "pd.Series[Any]", unit: str) -> list[str]:
    """Each value as text: numbers of one column have equally many decimals."""
    scale = SCALES.get(unit, 1.0)
    decimals = _decimals([v * scale for v in values if isinstance(v, int | float)], unit)

    def text(value: Value) -> str:
        if isinstance(value, int | float):
            return f"{value * scale:,.{decimals}f}".replace(",", THIN_SPACE)
        return MISSING if value is None else value

    return [text(value) for value in values]


def _decimals(numbers: Sequence[float], unit: str) -> int:
    """One for rates; else enough for two digits of the smallest number, three where it is kB."""
    if unit == "%":
        return 1
    if unit not in SCALES and all(float(v).is_integer() for v in numbers):
        return 0
    smallest = min((abs(v) for v in numbers if v), default=0.0)
    wanted = 100 if unit == "kB" else 10  # bytes are exact, times are not
    return next((n for n in range(4) if smallest * 10**n >= wanted), 4)


def _column(key: str, title: str, path: str | Sequence[str], unit: str = "") -> Column:
    """A column of what is found by following attributes and keys; None if one is not known."""
    names = path.split(".") if isinstance(path, str) else path

    def value(profile: Profile) -> Value:
        found: Any = profile
        for name in names:
            found = found.get(name) if isinstance(found, dict) else getattr(found, name)
            if found is None:
                return None
        return options(found) if isinstance(found, dict) else found

    return Column(key, title, value, unit)


def _sizes(key: str, title: str, path: str, kind: str, suffix: str = "") -> list[Column]:
    """Bytes of one kind: allocated, and held."""
    return [
        _column(
            f"{key}_allocated{suffix}", f"{title}, allocated", f"{path}.allocated.{kind}", "kB"
        ),
        _column(f"{key}_bytes{suffix}", f"{title}, held", f"{path}.bytes.{kind}", "kB"),
    ]


def _streams_per_gib(key: str, title: str, path: str) -> Column:
    """Streams whose states fit, without the position tables, which they share."""
    total = _column("", "", f"{path}.allocated.total").value

    def value(profile: Profile) -> Value:
        size = total(profile)
        return 2**30 // size if isinstance(size, int) else None

    return Column(key, title, value)


def _cache(profiles: Sequence[Profile]) -> list[Column]:
    own, bounded, unbounded = (
        "own_cache",
        "own_cache.longest.bounded",
        "own_cache.longest.unbounded",
    )
    per_second, formula = f"{own}.attention_bytes_per_second", f"{bounded}.analytic.attention"
    columns = [
        _column("cache_dtype", "cache_dtype", "cache_dtype"),
        *_sizes("cache_attention", "cache", bounded, "attention"),
        _column("cache_attention_formula", "cache, held, computed", formula, "kB"),
        *_sizes("cache_conv", "convolution", bounded, "conv"),
        *_sizes("cache_input", "input", bounded, "input"),
        _column("cache_rest_allocated", "conv. and input, allocated", f"{bounded}.rest", "kB"),
        *_sizes("cache_total", "whole state", bounded, "total"),
        _streams_per_gib("streams_per_gib", "streams a GiB", bounded),
        *_sizes("unbounded", "cache, unbounded", unbounded, "attention"),
        _column("position_bytes", "position tables, shared", f"{own}.position", "kB"),
        _column("bytes_per_frame", "added per frame", f"{own}.attention_bytes_per_frame", "B"),
        _column("bytes_per_second", "added per second", per_second, "kB"),
    ]
    for side, words, suffix in (("bounded", "", ""), ("unbounded", ", unbounded", "_unbounded")):
        for reference, said in (("mha", "mha"), ("input", "input cache")):
            title = f"compression against {said}{words}"
            path = f"compression.{reference}.{side}"
            columns.append(_column(f"compression_{reference}{suffix}", title, path))
    for dtype in dict.fromkeys(d for p in profiles for d in p.cache if d != p.cache_dtype):
        path, title = f"cache.{dtype}.longest.bounded", f"cache as {dtype}"
        columns += _sizes("cache_attention", title, path, "attention", f"_{dtype}")
        columns.append(
            _streams_per_gib(f"streams_per_gib_{dtype}", f"streams a GiB, {title}", path)
        )
    return columns


def _decoder() -> list[Column]:
    return [
        *_sizes("decoder_self", "self", "decoder_cache", "decoder_self"),
        *_sizes("decoder_cross", "cross", "decoder_cache", "decoder_cross"),
        _column("bytes_per_token", "added per token", "decoder_cache.bytes_per_token", "B"),
        _column("decoder_bytes_per_frame", "added per frame", "decoder_cache.bytes_per_frame", "B"),
        *(
            _column(f"decoder_{name}", name, f"decoder_cache.{name}")
            for name in ("hypotheses", "tokens", "frames")
        ),
    ]


def _time() -> list[Column]:
    def spread(name: str, title: str) -> list[Column]:
        parts = {"p50": "median", "mean": "mean", "p95": "p95", "p99": "p99"}
        return [
            _column(f"{name}_{part}", f"{title}, {words}", f"time.{name}.{part}", "ms")
            for part, words in parts.items()
        ]

    return [
        *spread("chunk_ms", "chunk"),
        _column("streaming_rtf", "RTF, streaming", "time.streaming_rtf"),
        *spread("utterance_ms", "utterance"),
        _column("rtf", "RTF, offline", "time.rtf"),
        *spread("first_token_ms", "first token"),
    ]


def _engines(profiles: Sequence[Profile]) -> list[Column]:
    """Streaming with exported graphs and, beside them, with torch."""
    columns = []
    for name in dict.fromkeys(name for profile in profiles for name in profile.engines):
        path, key = f"engines.{name}", f"engine_{name.replace(' ', '_')}"
        columns += [
            _column(f"{key}_chunk_ms_p50", f"{name}: chunk, median", f"{path}.chunk_ms.p50", "ms"),
            _column(f"{key}_rtf", f"{name}: RTF", f"{path}.streaming_rtf"),
            *_sizes(f"{key}_attention", f"{name}: cache", path, "attention"),
            *_sizes(f"{key}_total", f"{name}: whole state", path, "total"),
        ]
    return columns


def _memory() -> list[Column]:
    macs = "million per second of audio"
    return [
        _column("streaming_bytes", "peak memory, streaming", "memory.streaming_bytes", "MB"),
        _column("offline_bytes", "peak memory, offline", "memory.offline_bytes", "MB"),
        _column("parameters", "parameters", "model.parameters", "million"),
        _column("parameter_bytes", "parameters", "model.parameter_bytes", "MB"),
        _column("macs_per_second", "multiply-accumulates", "model.macs_per_second", macs),
    ]


def _error_rates(profiles: Sequence[Profile], kind: str) -> list[Column]:
    sets = dict.fromkeys(name for p in profiles for sets in p.wer.values() for name in sets)
    modes = sorted({mode for p in profiles for mode in p.wer})
    columns = []
    for name in sets:
        for mode in modes:
            key = f"{kind}_{re.sub(r'\W+', '_', mode)}_{name}"
            title, path = f"{kind.upper()} {name}, {mode}", ("wer", mode, name)
            columns.append(_column(key, title, (*path, kind), "%"))  # a name may have dots
            for place, bound in enumerate(("low", "high")):
                interval = _column("", "", (*path, f"{kind}_interval")).value
                columns.append(
                    Column(f"{key}_{bound}", title, _at(interval, place), "%", bound=True)
                )
    return columns


def _at(values: Callable[[Profile], Any], place: int) -> Callable[[Profile], Value]:
    """One of the values that are known together."""
    return lambda profile: None if (found := values(profile)) is None else found[place]


def _settings() -> list[Column]:
    def decodings(profile: Profile) -> Value:
        named = dict.fromkeys(r.decoding for sets in profile.wer.values() for r in sets.values())
        return ", ".join(name for name in named if name) or None

    def plain(part: str, names: Iterable[str]) -> list[Column]:
        return [_column(name, name, f"{part}.{name}") for name in names]

    return [
        _column("name", "name", "name"),
        *plain("model", ("encoder", "decoder", "weights", "config", "overlay", "model_file")),
        Column("attention", "attention", attention_name),
        Column("origin", "origin", origin),
        Column("decodings", "decodings", decodings),
        *plain("settings", Settings.model_fields),
        _column("longest_seconds", "longest audio", "own_cache.longest.seconds", "s"),
        _column("memory_method", "memory measured as", "memory.method"),
    ]


def joined(parts: Sequence[Table]) -> pd.DataFrame:
    """The values of all tables, every column once."""
    values = pd.concat([part.values for part in parts], axis=1)
    return values.loc[:, ~values.columns.duplicated()]


def comparison_csv(parts: Sequence[Table], notes: Notes) -> str:
    """Every column, values in base units, unknown ones empty."""
    said = ["; ".join(notes.texts[mark - 1] for mark in marks) for marks in notes.marks]
    return joined(parts).assign(notes=said).to_csv(lineterminator="\n")


def plain(overview: Table, notes: Notes) -> str:
    """The overview for a terminal: headings are a list, so that the rows stay short."""
    shown = overview.shown().set_axis(
        [
            name + "".join(f" [{mark}]" for mark in marks)
            for name, marks in zip(overview.values.index, notes.marks, strict=True)
        ]
    )
    shown.columns = pd.Index([f"({n})" for n in range(1, shown.shape[1] + 1)])
    return "\n".join(
        [
            *(f"({n}) {column.heading}" for n, column in enumerate(overview.columns, 1)),
            shown.to_string(max_colwidth=None),
            *(f"[{n}] {text}" for n, text in enumerate(notes.texts, 1)),
        ]
    )


def markdown(models: Sequence[Entry], overview: Table, notes: Notes, command: str) -> str:
    """The overview in Markdown: what all rows share, the table, the notes, the commands."""
    shown = overview.shown().map(_escaped)
    lines = [
        f"|{'|'.join(['model', *(_escaped(column.heading) for column in overview.columns)])}|",
        f"|---|{'---:|' * len(overview.columns)}",
    ]
    for (name, row), marks in zip(shown.iterrows(), notes.marks, strict=True):
        marked = f" <sup>{','.join(map(str, marks))}</sup>" if marks else ""
        lines.append(f"|{'|'.join([_escaped(str(name)) + marked, *row])}|")
    shared = ", ".join(f"{name} {value}" for name, value in notes.shared.items())
    numbered = [f"{n}. {_escaped(text)}" for n, text in enumerate(notes.texts, 1)]
    ran = [(e.name, run.settings.command) for e in models for run in e.runs]
    ran.append(("this table", command))
    commands = [f"- {_escaped(name)}: {_code(text)}" for name, text in ran if text]
    made = "<details><summary>Commands</summary>\n\n" + "\n".join(commands) + "\n\n</details>"
    parts = [_escaped(shared), "\n".join(lines), "\n".join(numbered), made]
    return "\n\n".join(part for part in parts if part)


def placed(text: str, title: str, block: str, path: Path) -> str:
    """`text`, which is the content of `path`, with `block` between the markers of `title`.

    Without markers the block is added at the end.

    Raises:
        UserError: one marker is missing or a marker is there twice.
    """
    name = title.replace("--", "-").replace(">", "")
    begin, end = f"<!-- comparison: {name} -->", f"<!-- /comparison: {name} -->"
    return files.placed(text, begin, end, block, path)


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{' '.join(text.split())}{fence}"


def _escaped(text: str) -> str:
    """`text` in a cell of a Markdown table."""
    text = text.replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return text
