"""Bytes of the encoder's cache between two chunks: read off running streams, beside arithmetic.

Held bytes are those of the frames that a stream may still attend to, allocated bytes those of the
storage: a ring has room for the chunk that comes next, and an unbounded one doubles as it fills.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from espnet_kv.cache import EncoderState
from espnet_kv.encoder.streaming import subsampling
from espnet_kv.errors import UserError
from espnet_kv.profile import schema
from espnet_kv.profile.analytic import EncoderArithmetic
from espnet_kv.profile.subject import Subject, encoder_with

# an unbounded cache is filled in chunks of so many frames at most
LONG_CHUNK = 512
LAYER_KINDS = ("attention", "conv")


class MismatchError(UserError):
    """A cache does not hold what arithmetic says."""


@dataclass(frozen=True)
class Held:
    """What one stream holds, and the storage that it takes.

    frames: encoded so far.
    bytes: held, by kind.
    allocated: bytes of the storage, by the same kinds.
    layers: of the encoder.
    """

    frames: int
    bytes: dict[str, int]
    allocated: dict[str, int]
    layers: list[schema.Layer]


def hold(
    encoder: Any,
    features: Tensor,
    marks: Sequence[int],
    chunk_size: int,
    left_chunks: int,
    cache_dtype: str | None = None,
) -> list[Held]:
    """Stream features and look at the state after so many of them.

    Args:
        encoder: a streaming encoder in eval mode.
        features: (T, F).
        marks: ascending, at most T.
        chunk_size, left_chunks, cache_dtype: of the stream.
    """
    held, fed = [], 0
    state = encoder.init_state(
        chunk_size=chunk_size, left_chunks=left_chunks, cache_dtype=cache_dtype
    )
    for mark in marks:
        xs, fed = features[None, fed:mark], mark
        if left_chunks < 0:
            _advance(encoder, state, xs, chunk_size)
        else:
            encoder.forward_chunk(xs, state)
        held.append(_held(encoder, state))
    return held


def _advance(encoder: Any, state: EncoderState, xs: Tensor, chunk_size: int) -> None:
    """Feed xs (1, T, F) to a stream of unbounded left context.

    It goes in longer chunks, which cost less, and as many frames as chunks of chunk_size would
    hold: where nothing is dropped the state does not know how they were cut up.
    """
    stride, window = subsampling(encoder.embed)
    ready = max(0, (state.features.lengths[0] + xs.size(1) - window) // stride + 1)
    whole = ready // chunk_size * chunk_size
    longest = max(1, LONG_CHUNK // chunk_size) * chunk_size
    sizes = [longest] * (whole >= longest) + [whole % longest] * (whole % longest > 0)
    for size in sizes or [chunk_size]:
        state.chunk_size = size
        encoder.forward_chunk(xs, state)
        xs = xs[:, :0]
    state.chunk_size = chunk_size


def _held(encoder: Any, state: EncoderState) -> Held:
    held, allocated = state.nbytes_by_kind(), state.capacity_by_kind()
    own = {kind: allocated[kind] for kind in held}  # position tables are not one stream's
    return Held(state.frames[0], held, own, _layers(encoder, state))


def _layers(encoder: Any, state: EncoderState) -> list[schema.Layer]:
    layers, modules = [], state.modules
    for block in encoder.encoders:
        own = [modules[m.state_index] for m in block.modules() if hasattr(m, "state_index")]
        held, allocated = (
            {kind: sum(getattr(s, what) for s in own if s.kind == kind) for kind in LAYER_KINDS}
            for what in ("nbytes", "capacity_bytes")
        )
        layers.append(schema.Layer(**held, allocated=schema.LayerKinds(**allocated)))
    return layers


def position_bytes(encoder: Any, features: Tensor, chunk_size: int, left_chunks: int) -> int:
    """Bytes of the tables of relative positions, which streams with the same settings share.

    Args:
        features: (T, F), of a chunk or more: the tables are made at the first chunk.
    """
    stride, window = subsampling(encoder.embed)
    first_chunk = features[: chunk_size * stride + window]
    state = encoder.init_state(chunk_size=chunk_size, left_chunks=left_chunks)
    encoder.forward_chunk(first_chunk[None], state)
    return state.capacity_by_kind()["position"]


def arithmetic(subject: Subject) -> EncoderArithmetic:
    """The subject's cache by formula."""
    conf = subject.args.encoder_conf
    return EncoderArithmetic(
        encoder=encoder_name(subject),
        conf=subject.encoder.espnet_conf,
        attention_type=conf.get("attention_type", "mha"),
        attention_conf=conf.get("attention_conf") or {},
        mels=subject.model.frontend.output_size(),
        subsampling=subsampling(subject.encoder.embed),
        chunk_size=subject.chunk_size,
    )


def encoder_name(subject: Subject) -> str:
    """conformer, ...: without kv_."""
    return str(subject.args.encoder).removeprefix("kv_")


def measure(
    subject: Subject, features: Tensor, seconds: Sequence[float], cache_dtype: str
) -> schema.Cache:
    """One cache_dtype of the profile's `cache`.

    Args:
        features: (T, F), of the longest length.
        seconds: lengths, ascending.

    Raises:
        MismatchError: a stream does not hold what arithmetic says.
    """
    marks = marks_of(subject, seconds)
    expected = arithmetic(subject)
    lengths: list[dict[str, Any]] = [{"seconds": length} for length in seconds]
    held = {}
    for bound, left in (("bounded", subject.left_chunks), ("unbounded", -1)):
        held[bound] = hold(subject.encoder, features, marks, subject.chunk_size, left, cache_dtype)
        for length, mark, one in zip(lengths, marks, held[bound], strict=True):
            analytic = expected.bytes(mark, left, cache_dtype)
            where = f"{cache_dtype}, {bound}, {length['seconds']:g} s"
            check(one.bytes, analytic, where)
            length["frames"] = one.frames
            length[bound] = schema.Held(
                bytes=schema.Kinds(**one.bytes),
                analytic=schema.Kinds(**analytic),
                allocated=schema.Kinds(**one.allocated),
            )
    first, last = held["unbounded"][0], held["unbounded"][-1]
    per_frame = _slope(first, last)
    per_second = None if per_frame is None else per_frame / subject.frame_seconds
    left, chunk = subject.left_chunks, subject.chunk_size
    return schema.Cache(
        lengths=[schema.CacheLength(**length) for length in lengths],
        layers=held["bounded"][-1].layers,
        position=position_bytes(subject.encoder, features, chunk, left),
        attention_bytes_per_frame=per_frame,
        attention_bytes_per_second=per_second,
    )


def _slope(first: Held, last: Held) -> float | None:
    """Attention bytes that a frame more adds; None where the lengths are the same."""
    frames = last.frames - first.frames
    return (last.bytes["attention"] - first.bytes["attention"]) / frames if frames else None


def marks_of(subject: Subject, seconds: Sequence[float]) -> list[int]:
    """Features that a stream has given after so many seconds: a frame waits for its last sample."""
    frontend = subject.frontend()
    samples = [round(length * frontend.sample_rate) for length in seconds]
    beyond = frontend.borders[1] - frontend.n_fft
    return [max(0, (count + beyond) // frontend.hop_length + 1) for count in samples]


def check(measured: dict[str, int], analytic: dict[str, int], where: str) -> None:
    """Hold measured bytes against arithmetic.

    Raises:
        MismatchError: they differ.
    """
    for kind, count in measured.items():
        if count != analytic[kind]:
            raise MismatchError(
                f"cache ({where}): {kind} holds {count} bytes, but arithmetic says "
                f"{analytic[kind]}: one of the two is wrong; please report it"
            )


def compare(
    subject: Subject, features: Tensor, own: schema.CacheLength, cache_dtype: str
) -> dict[str, schema.Ratio]:
    """The profile's `compression`: attention bytes of mha and of mha `cache: input` over own.

    All of them are allocated bytes, as the figure that stands for a cache is.

    Args:
        features: of the longest length.
        own: its entry in `measure`'s lengths.
    """
    marks = marks_of(subject, [own.seconds])
    ratios = {}
    for name, conf in (("mha", {}), ("input", {"cache": "input"})):
        encoder = encoder_with(subject, "mha", **conf)
        sides = {}
        for bound, left in (("bounded", subject.left_chunks), ("unbounded", -1)):
            (reference,) = hold(encoder, features, marks, subject.chunk_size, left, cache_dtype)
            allocated = getattr(own, bound).allocated.attention
            sides[bound] = reference.allocated["attention"] / allocated
        ratios[name] = schema.Ratio(**sides)
    return ratios
