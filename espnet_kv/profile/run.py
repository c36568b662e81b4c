"""A whole profile: every measurement of one model, as docs/profile.md describes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from espnet_kv.attention import ATTENTIONS, attention_label
from espnet_kv.cache.codec import FLOATS
from espnet_kv.decoder.cached import CachedDecoder
from espnet_kv.errors import UserError
from espnet_kv.files import commit
from espnet_kv.profile import cache_bytes, growth, machine, macs, schema
from espnet_kv.profile.beam_search import (
    TOKENS_PER_SECOND,
    Recognizer,
    decoder_conf,
    measure_decoder,
    search_options,
    time_utterances,
)
from espnet_kv.profile.engines import measure_engines
from espnet_kv.profile.latency import Streamer, time_chunks, time_hour
from espnet_kv.profile.sound import Sound, features
from espnet_kv.profile.subject import Subject
from espnet_kv.streaming.engine import EngineBuilder

MEMORY = ("offline_bytes", "streaming_bytes", "offline_rss_bytes", "streaming_rss_bytes")
"""Peak memory of an encoder pass over the whole and of a stream, by torch and by the system."""


@dataclass(frozen=True)
class Options:
    """How a model is profiled.

    seconds: lengths, ascending. cache_dtypes: besides the model's own. repeats: of every
    utterance. hour: whether an hour is streamed. search, streaming_search: options of the two.
    engines: exported graphs to stream with, besides the model itself.
    """

    seconds: Sequence[float]
    cache_dtypes: Sequence[str] = ()
    repeats: int = 3
    hour: bool = False
    search: Mapping[str, Any] = field(default_factory=dict)
    streaming_search: Mapping[str, Any] = field(default_factory=dict)
    engines: Mapping[str, EngineBuilder] = field(default_factory=dict)


def profile(
    name: str, subject: Subject, sound: Sound, options: Options, say: Callable[[str], None]
) -> schema.Profile:
    """Everything that is measured of a model: the profile without paths, command and error rates.

    Args:
        name: of the model.
        say: called with progress messages.

    Raises:
        UserError: a measurement cannot be made, or a cache does not hold what it should.
    """
    search = search_options(subject, options.search)  # before anything is measured
    streamed = _stream(subject, sound, options, say) if subject.streams else Streamed()
    task = growth.Task(
        subject.source, sound, options.seconds, subject.chunk_size, subject.left_chunks
    )
    method, rows = growth.measure(task, subject, say)
    engines = measure_engines(subject, sound, options.engines, options.streaming_search, say)
    hour = time_hour(subject, sound) if options.hour and subject.streams else []
    # must come last: it changes the output bias of random weights in place
    recognizer = Recognizer(subject, search)
    utterance_ms, rtf = time_utterances(recognizer, sound, options.repeats)
    say(f"utterances: {utterance_ms.mean:.0f} ms, real-time factor {rtf:.3f}")
    return schema.Profile(
        schema=schema.SCHEMA,
        name=name,
        model=_model(subject, streamed.macs_per_second),
        settings=_settings(subject, sound, recognizer, streamed),
        cache=streamed.cache,
        decoder_cache=measure_decoder(recognizer, _typical(sound)),
        compression=streamed.compression,
        time=schema.Time(
            utterance_ms=utterance_ms,
            rtf=rtf,
            chunk_ms=streamed.chunk_ms,
            streaming_rtf=streamed.rtf,
            first_token_ms=streamed.first_token_ms,
            lengths=[schema.TimeLength(**_pick(row, schema.TimeLength)) for row in rows],
            hour=hour,
        ),
        memory=schema.Memory(
            method=method,
            lengths=[schema.MemoryLength(**_pick(row, schema.MemoryLength)) for row in rows],
            **{key: rows[-1].get(key) for key in MEMORY},
        ),
        engines=engines,
    )


@dataclass(frozen=True)
class Streamed:
    """What is measured of streams; empty for a model that does not stream."""

    cache: dict[str, schema.Cache] = field(default_factory=dict)
    compression: dict[str, schema.Ratio] = field(default_factory=dict)
    macs_per_second: float | None = None
    chunk_ms: schema.Spread | None = None
    rtf: float | None = None
    first_token_ms: schema.Spread | None = None
    search: dict[str, Any] = field(default_factory=dict)


def _stream(
    subject: Subject, sound: Sound, options: Options, say: Callable[[str], None]
) -> Streamed:
    own = model_dtype(subject)
    say(f"cache: {sound.name}, {', '.join(f'{s:g}' for s in options.seconds)} s")
    xs = features(subject, sound.clip(options.seconds[-1]))
    caches = {}
    for cache_dtype in dict.fromkeys([own, *options.cache_dtypes]):
        caches[cache_dtype] = cache_bytes.measure(subject, xs, options.seconds, cache_dtype)
        say(f"cache {cache_dtype}: {_summary(caches[cache_dtype])}")
    compression = cache_bytes.compare(subject, xs, caches[own].lengths[-1], own)
    say(f"compression: {compression['mha'].bounded:.3g} against mha")
    macs_per_second = macs.macs_per_second(subject, sound)
    chunk_ms = time_chunks(subject, sound)
    say(f"chunk: {chunk_ms.p50:.2f} ms")
    streamer = Streamer(subject, options.streaming_search)
    rtf = streamer.real_time_factor(sound)
    first_token_ms = streamer.first_tokens(sound)
    say(f"streaming: real-time factor {rtf:.3f}")
    return Streamed(
        caches, compression, macs_per_second, chunk_ms, rtf, first_token_ms, streamer.options
    )


def model_dtype(subject: Subject) -> str:
    """The model's own type by the name that cache_dtype gives it."""
    dtype = next(subject.encoder.parameters()).dtype
    for name, known in FLOATS.items():
        if known == dtype:
            return name
    raise UserError(
        f"a model of {dtype} cannot be profiled (allowed: {', '.join(FLOATS)}): convert its "
        "parameters, model.float()"
    )


def _summary(measured: schema.Cache) -> str:
    longest = measured.lengths[-1]
    assert longest.bounded is not None and longest.unbounded is not None
    return (
        f"attention {longest.bounded.allocated.attention} bytes allocated "
        f"({longest.bounded.bytes.attention} held) bounded, "
        f"{longest.unbounded.allocated.attention} unbounded at {longest.seconds:g} s"
    )


def _typical(sound: Sound) -> Any:
    """The utterance of median length."""
    return sorted(sound.utterances, key=len)[len(sound.utterances) // 2]


def _pick(row: Mapping[str, Any], part: type[schema.Part]) -> dict[str, Any]:
    """What of a measurement belongs to one part of the profile."""
    return {key: row.get(key) for key in part.model_fields}


def _model(subject: Subject, macs_per_second: float | None) -> schema.Model:
    conf = subject.args.encoder_conf
    attention_type = conf.get("attention_type", "mha")
    decoder = subject.model.decoder
    counted: dict[str, Any] = {**macs.parameters(subject.model)}
    attention: dict[str, Any] = {}
    if isinstance(decoder, CachedDecoder):
        module = subject.model.decoder  # for mypy
        for place in ("self", "src"):
            for key in (f"{place}_attention_type", f"{place}_attention_conf"):
                attention[key] = decoder_conf(subject)[key] or {}
            attention[f"{place}_attention_label"] = attention_label(module, place == "src")
    return schema.Model(
        encoder=cache_bytes.encoder_name(subject),
        attention_type=attention_type,
        attention_conf=conf.get("attention_conf") or {},
        attention_label=attention_label(subject.encoder),
        attention_colour_slot=ATTENTIONS[attention_type].colour_slot,
        decoder=None if decoder is None else str(subject.args.decoder).removeprefix("kv_"),
        **attention,
        weights="trained" if subject.source.trained else "random",
        training_seed=subject.args.seed if subject.source.trained else None,
        **counted,
        macs_per_second=macs_per_second,
    )


def _settings(
    subject: Subject, sound: Sound, recognizer: Recognizer, streamed: Streamed
) -> schema.Settings:
    return schema.Settings(
        device=subject.device,
        device_name=machine.device_name(subject.device),
        dtype=str(next(subject.encoder.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        seed=subject.source.seed,
        chunk_size=subject.chunk_size if subject.streams else None,
        left_chunks=subject.left_chunks if subject.streams else None,
        frame_ms=1000 * subject.frame_seconds,
        audio=sound.name,
        utterances=len(sound.utterances),
        utterance_seconds=sound.seconds,
        search=recognizer.options,
        streaming_search=streamed.search,
        tokens_per_second=None if subject.source.trained else TOKENS_PER_SECOND,
        commit=commit(),
        date=machine.now(),
        **machine.versions(),
    )
