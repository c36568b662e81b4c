"""Bytes of the encoder's cache between two chunks: read off running streams, beside arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from espnet_kv.cache import EncoderState
from espnet_kv.encoder.streaming import subsampling
from espnet_kv.errors import UserError
from espnet_kv.profile.analytic import EncoderArithmetic
from espnet_kv.profile.subject import Subject, encoder_with

# an unbounded cache is filled in chunks of so many frames at most
LONG_CHUNK = 512


class MismatchError(UserError):
    """A cache does not hold what arithmetic says."""


@dataclass(frozen=True)
class Held:
    """What one stream holds.

    frames: encoded so far. bytes: by kind. layers: {attention, conv} of each encoder layer.
    """

    frames: int
    bytes: dict[str, int]
    layers: list[dict[str, int]]


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
        held.append(Held(state.frames[0], state.nbytes_by_kind(), _layers(encoder, state)))
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


def _layers(encoder: Any, state: EncoderState) -> list[dict[str, int]]:
    layers, modules = [], state.modules
    for block in encoder.encoders:
        own = [modules[m.state_index] for m in block.modules() if hasattr(m, "state_index")]
        layers.append(
            {kind: sum(s.nbytes for s in own if s.kind == kind) for kind in ("attention", "conv")}
        )
    return layers


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
) -> dict[str, Any]:
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
            length[bound] = {"bytes": one.bytes, "analytic": analytic}
    first, last = held["unbounded"][0], held["unbounded"][-1]
    per_frame = _slope(first, last)
    return {
        "lengths": lengths,
        "layers": held["bounded"][-1].layers,
        "attention_bytes_per_frame": per_frame,
        "attention_bytes_per_second": None
        if per_frame is None
        else per_frame / subject.frame_seconds,
    }


def _slope(first: Held, last: Held) -> float | None:
    """Attention bytes that a frame more adds; None where the lengths are the same."""
    frames = last.frames - first.frames
    return (last.bytes["attention"] - first.bytes["attention"]) / frames if frames else None


def marks_of(subject: Subject, seconds: Sequence[float]) -> list[int]:
    """Features that a stream has given after so many seconds: a frame waits for its last sample."""
    frontend = subject.frontend()
    samples = [round(length * frontend.sample_rate) for length in seconds]
    beyond = frontend.border - frontend.n_fft
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
    subject: Subject, features: Tensor, seconds: float, own: dict[str, Any], cache_dtype: str
) -> dict[str, Any]:
    """The profile's `compression`: attention bytes of mha and of mha `cache: input` over own.

    Args:
        features, seconds: of the longest length. own: its entry in `measure`'s lengths.
    """
    marks = marks_of(subject, [seconds])
    ratios: dict[str, dict[str, float]] = {}
    for name, conf in (("mha", {}), ("input", {"cache": "input"})):
        encoder = encoder_with(subject, "mha", **conf)
        ratios[name] = {}
        for bound, left in (("bounded", subject.left_chunks), ("unbounded", -1)):
            (reference,) = hold(encoder, features, marks, subject.chunk_size, left, cache_dtype)
            ratios[name][bound] = reference.bytes["attention"] / own[bound]["bytes"]["attention"]
    return ratios
