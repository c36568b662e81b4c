"""What `espnet_kv.bin.profile` wrote, read back and checked: the dataclasses here are its schema.

Sizes are in bytes, times in ms, lengths in seconds of audio unless a name says otherwise.
A field with a default may be absent or null in the file: not known. Other keys are ignored.
"""

import json
import math
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from espnet_kv.errors import UserError, one_line

SCHEMA = "espnet_kv.profile/2"


@dataclass(frozen=True)
class Model:
    """What was profiled.

    converted_from: the provenance that a conversion wrote; None for a model trained as it is.
    macs_per_second: multiply-accumulates of the streamed encoder for a second of audio.
    """

    encoder: str
    attention_type: str
    weights: str
    attention_conf: dict[str, Any] = field(default_factory=dict)
    decoder: str | None = None
    self_attention_type: str | None = None
    self_attention_conf: dict[str, Any] = field(default_factory=dict)
    src_attention_type: str | None = None
    src_attention_conf: dict[str, Any] = field(default_factory=dict)
    experiment: str | None = None
    config: str | None = None
    overlay: str | None = None
    model_file: str | None = None
    converted_from: dict[str, Any] | None = None
    parameters: int | None = None
    parameter_bytes: int | None = None
    macs_per_second: float | None = None


@dataclass(frozen=True)
class Settings:
    """Under what conditions: figures of two profiles compare where these agree.

    search, streaming_search: options of the searches that were timed.
    tokens_per_second: at what rate a search on random weights was made to emit tokens.
    """

    device: str
    device_name: str | None = None
    dtype: str | None = None
    threads: int | None = None
    seed: int | None = None
    chunk_size: int | None = None
    left_chunks: int | None = None
    frame_ms: float | None = None
    audio: str | None = None
    utterances: int | None = None
    utterance_seconds: float | None = None
    search: dict[str, Any] = field(default_factory=dict)
    streaming_search: dict[str, Any] = field(default_factory=dict)
    tokens_per_second: float | None = None
    command: str | None = None
    commit: str | None = None
    date: str | None = None
    python: str | None = None
    torch: str | None = None
    espnet: str | None = None
    espnet_kv: str | None = None


@dataclass(frozen=True)
class Kinds:
    """Bytes of an encoder's state by kind."""

    attention: int
    conv: int = 0
    input: int = 0

    @property
    def total(self) -> int:
        return self.attention + self.conv + self.input


@dataclass(frozen=True)
class Held:
    """Bytes between two chunks: held, measured and by formula, and allocated for them.

    allocated: of the storage: that of a ring has room for the chunk that comes next, and that of
    an unbounded one doubles as it fills.
    """

    bytes: Kinds
    analytic: Kinds | None = None
    allocated: Kinds | None = None


@dataclass(frozen=True)
class CacheLength:
    """What a stream holds after `seconds` of audio: bounded by left_chunks, and unbounded."""

    seconds: float
    bounded: Held | None = None
    unbounded: Held | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Layer:
    """Bytes of one encoder layer, bounded, at the longest length: held, and allocated."""

    attention: int
    conv: int = 0
    allocated: Kinds | None = None


@dataclass(frozen=True)
class Cache:
    """The encoder's cache in one cache_dtype, per stream.

    position: bytes of the tables of relative positions, bounded; streams with the same settings
    share them, so that they are part of no stream's cache.
    """

    lengths: list[CacheLength] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    position: int | None = None
    attention_bytes_per_frame: float | None = None
    attention_bytes_per_second: float | None = None

    @property
    def longest(self) -> CacheLength | None:
        """The longest length at which anything was measured."""
        return max(self.lengths, key=lambda length: length.seconds, default=None)


@dataclass(frozen=True)
class DecoderKinds:
    """Bytes of a decoder's state by kind."""

    decoder_self: int
    decoder_cross: int


@dataclass(frozen=True)
class DecoderCache:
    """What the decoder holds after `tokens` tokens of `hypotheses`, over `frames` frames.

    allocated: bytes of the storage for it.
    """

    bytes: DecoderKinds
    analytic: DecoderKinds | None = None
    allocated: DecoderKinds | None = None
    hypotheses: int | None = None
    tokens: int | None = None
    frames: int | None = None
    bytes_per_token: float | None = None
    bytes_per_frame: float | None = None


@dataclass(frozen=True)
class Ratio:
    """How many times more is allocated for the reference than for this model."""

    bounded: float | None = None
    unbounded: float | None = None


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles."""

    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True)
class TimeLength:
    """Times at one length of audio."""

    seconds: float
    encode_ms: float | None = None
    chunk_ms: float | None = None


@dataclass(frozen=True)
class Minute:
    """Median time per chunk in one minute of a long stream."""

    minute: int
    chunk_ms: float


@dataclass(frozen=True)
class Time:
    """Inference time: whole utterances, chunks, the wait for the first token."""

    utterance_ms: Spread = field(default_factory=Spread)
    rtf: float | None = None
    chunk_ms: Spread = field(default_factory=Spread)
    streaming_rtf: float | None = None
    first_token_ms: Spread = field(default_factory=Spread)
    lengths: list[TimeLength] = field(default_factory=list)
    hour: list[Minute] = field(default_factory=list)


@dataclass(frozen=True)
class MemoryLength:
    """Peaks over what the loaded model holds by itself, at one length of audio."""

    seconds: float
    offline_bytes: int | None = None
    streaming_bytes: int | None = None


@dataclass(frozen=True)
class Memory:
    """Peak memory and how it was measured; the totals are those of the longest length."""

    method: str | None = None
    lengths: list[MemoryLength] = field(default_factory=list)
    offline_bytes: int | None = None
    streaming_bytes: int | None = None


@dataclass(frozen=True)
class Rates:
    """Error rates of one decoding in per cent."""

    wer: float | None = None
    cer: float | None = None
    decoding: str | None = None


@dataclass(frozen=True)
class Profile:
    """One profiled model.

    cache: by cache_dtype, the model's own first.
    compression: by reference (mha, input).
    wer: by mode (offline, streaming), then test set.
    """

    path: Path
    name: str
    model: Model
    settings: Settings
    cache: dict[str, Cache] = field(default_factory=dict)
    decoder_cache: DecoderCache | None = None
    compression: dict[str, Ratio] = field(default_factory=dict)
    time: Time = field(default_factory=Time)
    memory: Memory = field(default_factory=Memory)
    wer: dict[str, dict[str, Rates]] = field(default_factory=dict)

    @property
    def cache_dtype(self) -> str | None:
        """The model's own, in which its headline figures are."""
        return next(iter(self.cache), None)

    @property
    def own_cache(self) -> Cache | None:
        """The cache in the model's own cache_dtype."""
        return self.cache.get(self.cache_dtype or "")

    def held(self, cache_dtype: str | None = None) -> Kinds | None:
        """Bytes held, bounded, at the longest length; None where not measured."""
        bounded = self._bounded(cache_dtype)
        return bounded.bytes if bounded else None

    def allocated(self, cache_dtype: str | None = None) -> Kinds | None:
        """The headline cache size: bytes allocated, bounded, at the longest length.

        None where not measured.
        """
        bounded = self._bounded(cache_dtype)
        return bounded.allocated if bounded else None

    def _bounded(self, cache_dtype: str | None) -> Held | None:
        cache = self.cache.get(cache_dtype) if cache_dtype else self.own_cache
        longest = cache.longest if cache else None
        return longest.bounded if longest else None


def read_profile(path: Path) -> Profile:
    """The profile in the file `path`.

    Raises:
        UserError: the file cannot be read, is no profile or of another version, or a key is
            missing or holds what it must not; names file and key.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: profile the model first (stage 14)") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"{path} is no JSON file ({reason}): profile again (stage 14)") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path}: schema is {schema!r}, expected {SCHEMA!r}: profile again (stage 14)"
        )
    try:
        return _value(Profile, data | {"path": path}, "")
    except _Unexpected as error:
        raise UserError(f"{path}: {error}: profile again (stage 14)") from error


def read_profiles(paths: Iterable[Path]) -> list[Profile]:
    """The profiles in `paths`, in their order; a path given twice counts once.

    Raises:
        UserError: see `read_profile`; or there is no path.
    """
    profiles = [read_profile(path) for path in dict.fromkeys(paths)]
    if not profiles:
        raise UserError("there is no profile to report: profile a model first (stage 14)")
    return profiles


class _Unexpected(Exception):
    """A key of the file is not as the schema says."""


def _value(kind: Any, data: Any, key: str) -> Any:
    """`data` as `kind`: a dataclass, list[...], dict[str, ...], number, str, Path or Any."""
    if kind is Any:
        return data
    if get_origin(kind) in (types.UnionType, Union):  # X | None
        return None if data is None else _value(get_args(kind)[0], data, key)
    if is_dataclass(kind):
        return _object(kind, data, key)
    if get_origin(kind) is list:
        values = _checked(list, data, key, "a list")
        return [_value(get_args(kind)[0], v, f"{key}[{n}]") for n, v in enumerate(values)]
    if get_origin(kind) is dict:
        values = _checked(dict, data, key, "keys and values")
        inner = get_args(kind)[1]
        return {name: _value(inner, v, f"{key}.{name}") for name, v in values.items()}
    if kind in (int, float):
        number = _checked((int, kind), data, key, "a number" if kind is float else "a whole number")
        if isinstance(number, bool) or not math.isfinite(number):
            raise _Unexpected(f"{key}: expected a number, found {number!r}")
        if kind is float and number < 0:
            raise _Unexpected(f"{key}: expected no negative number, found {number!r}")
        return number
    return _checked(kind, data, key, "text")


def _object(kind: Any, data: Any, key: str) -> Any:
    given = _checked(dict, data, key, "keys and values")
    hints, values = get_type_hints(kind), {}
    for part in fields(kind):
        inner = f"{key}.{part.name}" if key else part.name
        if given.get(part.name) is not None:
            values[part.name] = _value(hints[part.name], given[part.name], inner)
        elif part.default is MISSING and part.default_factory is MISSING:
            raise _Unexpected(f"{inner} is missing")
    return kind(**values)


def _checked(kind: Any, data: Any, key: str, wanted: str) -> Any:
    if not isinstance(data, kind):
        raise _Unexpected(f"{key}: expected {wanted}, found {data!r:.60}")
    return data
