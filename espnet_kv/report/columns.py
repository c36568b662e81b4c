"""The columns of the tables: what of a profile they show, and in which unit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from espnet_kv.report.models import attention_name, options, origin
from espnet_kv.report.profiles import Profile

Value = str | float | None
MISSING = "–"  # noqa: RUF001  (an en dash)
THIN_SPACE = "\u2009"


@dataclass(frozen=True)
class Column:
    """One property of all models.

    key: its name in comparison.csv, where `value` stands as it is (bytes, ms, per cent).
    title, unit: its heading where people read, where `value` times `scale` is shown.
    """

    key: str
    title: str
    value: Callable[[Profile], Value]
    unit: str = ""
    scale: float = 1.0

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def known(self, profiles: Sequence[Profile]) -> bool:
        """Whether any of the models has it."""
        return any(self.value(profile) is not None for profile in profiles)

    def numeric(self, profiles: Sequence[Profile]) -> bool:
        """Whether it holds numbers, not text."""
        return not any(isinstance(self.value(profile), str) for profile in profiles)

    def shown(self, profiles: Sequence[Profile]) -> list[str]:
        """What stands in each row: numbers with equally many decimals, or MISSING."""
        values = [self.value(profile) for profile in profiles]
        decimals = self._decimals([v for v in values if isinstance(v, int | float)])
        return [
            MISSING
            if v is None
            else v
            if isinstance(v, str)
            else f"{v * self.scale:,.{decimals}f}".replace(",", THIN_SPACE)
            for v in values
        ]

    def _decimals(self, values: Sequence[float]) -> int:
        """One for rates; else so many that the smallest shows two figures, or three of bytes."""
        if self.unit == "%":
            return 1
        if self.scale == 1 and all(float(v).is_integer() for v in values):
            return 0
        smallest = min((abs(v) * self.scale for v in values if v), default=0.0)
        wanted = 100 if self.unit == "kB" else 10  # bytes are exact, times are not
        return next((n for n in range(4) if smallest * 10**n >= wanted), 4)


@dataclass(frozen=True)
class Table:
    """Columns under a title, and a sentence about them."""

    title: str
    columns: list[Column]
    about: str = ""


def tables(profiles: Sequence[Profile]) -> list[Table]:
    """Everything that is known, by subject, the overview first; the rest is left out."""
    found = [
        Table("Overview", _overview(profiles)),
        Table(
            "Cache",
            _cache(profiles),
            "Of one stream between two chunks, at the longest audio; bounded by left_chunks unless "
            "the heading says otherwise. Allocated are the bytes of the storage, held those of the "
            "frames in it that may still be attended to. Position tables are shared by all "
            "streams with the same settings.",
        ),
        Table(
            "Decoder cache",
            _decoder(),
            "What beam search keeps of tokens and of the audio: bytes of the storage (allocated), "
            "and those in use (held).",
        ),
        Table(
            "Time",
            _time(),
            "Of whole utterances (encoder and search), of streamed chunks, and from the first "
            "sample to the first token: the audio it has to wait for, and computing.",
        ),
        Table(
            "Memory and computation",
            _memory(),
            "Peaks are over what the loaded model holds by itself, at the longest audio.",
        ),
        Table("Error rates", [*_error_rates(profiles, "wer"), *_error_rates(profiles, "cer")]),
        Table("Settings", _settings()),
    ]
    kept = [Table(t.title, [c for c in t.columns if c.known(profiles)], t.about) for t in found]
    return [kept[0], *(table for table in kept[1:] if table.columns)]


def _at(*path: str) -> Callable[[Profile], Any]:
    """Follow attributes and keys; None as soon as one is not known."""

    def value(profile: Profile) -> Any:
        found: Any = profile
        for name in path:
            found = found.get(name) if isinstance(found, dict) else getattr(found, name)
            if found is None:
                return None
        return found

    return value


def _kb(key: str, title: str, value: Callable[[Profile], Value]) -> Column:
    return Column(key, title, value, "kB", 1e-3)


def _both(key: str, title: str, *path: str, kind: str, suffix: str = "") -> list[Column]:
    """Bytes of one kind: allocated, and held."""
    return [
        _kb(f"{key}_allocated{suffix}", f"{title}, allocated", _at(*path, "allocated", kind)),
        _kb(f"{key}_bytes{suffix}", f"{title}, held", _at(*path, "bytes", kind)),
    ]


def _mb(key: str, title: str, value: Callable[[Profile], Value]) -> Column:
    return Column(key, title, value, "MB", 1e-6)


def _overview(profiles: Sequence[Profile]) -> list[Column]:
    chosen = (
        *("cache_attention_allocated", "cache_attention_bytes", "compression_mha"),
        *("bytes_per_second", "cache_rest_allocated"),
        *("utterance_ms_mean", "rtf", "chunk_ms_p50", "streaming_rtf"),
        *("offline_bytes", "streaming_bytes"),
    )
    columns = {c.key: c for c in (*_cache(profiles), *_time(), *_memory())}
    found = [columns[key] for key in chosen]
    return [*found[:3], *_error_rates(profiles, "wer"), *found[3:]]


def _cache(profiles: Sequence[Profile]) -> list[Column]:
    def rest(profile: Profile) -> Value:
        allocated = profile.allocated()
        return allocated.total - allocated.attention if allocated else None

    bounded = ("own_cache", "longest", "bounded")
    unbounded = ("own_cache", "longest", "unbounded")
    dtypes = dict.fromkeys(d for p in profiles for d in p.cache if d != p.cache_dtype)
    return [
        Column("cache_dtype", "stored as", _at("cache_dtype")),
        *_both("cache_attention", "cache", *bounded, kind="attention"),
        _kb("cache_attention_formula", "held by formula", _at(*bounded, "analytic", "attention")),
        *_both("cache_conv", "convolution", *bounded, kind="conv"),
        *_both("cache_input", "input", *bounded, kind="input"),
        _kb("cache_rest_allocated", "conv. and input, allocated", rest),
        *_both("cache_total", "whole state", *bounded, kind="total"),
        *_both("unbounded", "cache, unbounded", *unbounded, kind="attention"),
        _kb("position_bytes", "position tables, shared", _at("own_cache", "position")),
        Column(
            "bytes_per_frame", "a frame adds", _at("own_cache", "attention_bytes_per_frame"), "B"
        ),
        _kb("bytes_per_second", "a second adds", _at("own_cache", "attention_bytes_per_second")),
        *(
            Column(
                f"compression_{reference}{suffix}",
                f"times less than {words}{', unbounded' if suffix else ''}",
                _at("compression", reference, side),
            )
            for suffix, side in (("", "bounded"), ("_unbounded", "unbounded"))
            for reference, words in (("mha", "mha"), ("input", "input cache"))
        ),
        *(
            column
            for dtype in dtypes
            for column in _both(
                "cache_attention",
                f"cache as {dtype}",
                *("cache", dtype, "longest", "bounded"),
                kind="attention",
                suffix=f"_{dtype}",
            )
        ),
    ]


def _time() -> list[Column]:
    def spread(name: str, title: str) -> list[Column]:
        parts = {"p50": "median", "mean": "mean", "p95": "p95", "p99": "p99"}
        return [
            Column(f"{name}_{part}", f"{title}, {words}", _at("time", name, part), "ms")
            for part, words in parts.items()
        ]

    return [
        *spread("chunk_ms", "chunk"),
        Column("streaming_rtf", "RTF, streaming", _at("time", "streaming_rtf")),
        *spread("utterance_ms", "utterance"),
        Column("rtf", "RTF, offline", _at("time", "rtf")),
        *spread("first_token_ms", "first token"),
    ]


def _memory() -> list[Column]:
    return [
        _mb("streaming_bytes", "peak memory, streaming", _at("memory", "streaming_bytes")),
        _mb("offline_bytes", "peak memory, offline", _at("memory", "offline_bytes")),
        Column("parameters", "parameters", _at("model", "parameters"), "million", 1e-6),
        _mb("parameter_bytes", "parameters", _at("model", "parameter_bytes")),
        Column(
            "macs_per_second",
            "multiply-accumulates",
            _at("model", "macs_per_second"),
            "million per second of audio",
            1e-6,
        ),
    ]


def _decoder() -> list[Column]:
    return [
        *_both("decoder_self", "self", "decoder_cache", kind="decoder_self"),
        *_both("decoder_cross", "cross", "decoder_cache", kind="decoder_cross"),
        Column("bytes_per_token", "a token adds", _at("decoder_cache", "bytes_per_token"), "B"),
        Column("decoder_bytes_per_frame", "a frame", _at("decoder_cache", "bytes_per_frame"), "B"),
        Column("decoder_hypotheses", "hypotheses", _at("decoder_cache", "hypotheses")),
        Column("decoder_tokens", "tokens", _at("decoder_cache", "tokens")),
        Column("decoder_frames", "frames", _at("decoder_cache", "frames")),
    ]


def _error_rates(profiles: Sequence[Profile], kind: str) -> list[Column]:
    sets = dict.fromkeys(name for p in profiles for sets in p.wer.values() for name in sets)
    return [
        Column(
            f"{kind}_{mode}_{name}",
            f"{kind.upper()} {name}, {mode}",
            _at("wer", mode, name, kind),
            "%",
        )
        for name in sets
        for mode in ("offline", "streaming")
    ]


def _settings() -> list[Column]:
    def decodings(profile: Profile) -> Value:
        named = dict.fromkeys(r.decoding for sets in profile.wer.values() for r in sets.values())
        return ", ".join(name for name in named if name) or None

    def plain(part: str, *names: str) -> list[Column]:
        return [Column(name, name.replace("_", " "), _at(part, name)) for name in names]

    return [
        Column("name", "name", _at("name")),
        *plain("model", "encoder"),
        Column("attention", "attention", attention_name),
        *plain("model", "decoder", "weights"),
        Column("origin", "origin", origin),
        *plain("model", "config", "overlay", "model_file"),
        Column("decodings", "decodings", decodings),
        *plain("settings", "device", "device_name", "dtype", "threads", "seed", "chunk_size"),
        *plain("settings", "left_chunks"),
        Column("frame_ms", "frame", _at("settings", "frame_ms"), "ms"),
        *plain("settings", "audio", "utterances"),
        Column("utterance_seconds", "their length", _at("settings", "utterance_seconds"), "s"),
        Column("search", "search", lambda p: options(p.settings.search)),
        Column(
            "streaming_search", "streaming search", lambda p: options(p.settings.streaming_search)
        ),
        *plain("settings", "tokens_per_second"),
        Column("memory_method", "memory measured as", _at("memory", "method")),
        *plain("settings", "commit", "date", "python", "torch", "espnet", "espnet_kv"),
        *plain("settings", "command"),
    ]
