"""Time of streaming: a chunk, the first token, a whole stream, an hour of it."""

import inspect
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

from torch import Tensor

from espnet_kv.profile.clock import median, milliseconds, spread, synchronize, undisturbed
from espnet_kv.profile.schema import Minute, Spread
from espnet_kv.profile.sound import Sound, features, pieces
from espnet_kv.profile.subject import Subject
from espnet_kv.streaming.engine import EngineBuilder, TorchEngine
from espnet_kv.streaming.frontend import StreamingFrontend
from espnet_kv.streaming.meter import Meter
from espnet_kv.streaming.recognizer import StreamingRecognizer

# chunks that are timed, and before them, beyond those that fill the left context, some that are not
CHUNKS, WARM_UP = 200, 10
OPTIONS = ("beam_size", "ctc_weight", "penalty")
"""What of a streaming configuration plays a part here."""


def time_chunks(subject: Subject, sound: Sound) -> Spread:
    """The profile's `chunk_ms`: forward_chunk once its left context is full."""
    state = subject.init_state()
    return time_steps(
        subject, sound, subject.frontend(), lambda x: subject.encoder.forward_chunk(x, state)
    )


def time_steps(
    subject: Subject,
    sound: Sound,
    frontend: StreamingFrontend,
    step: Callable[[Tensor], object],
) -> Spread:
    """Time of `step`, which takes (1, T, F) features of a chunk, once the left context is full."""
    before = max(0, subject.left_chunks) + WARM_UP
    seconds = (before + CHUNKS + 1) * subject.chunk_seconds
    xs = features(subject, sound.clip(seconds), frontend)
    with undisturbed():
        times = [
            milliseconds(subject.device, step, x)
            for x in pieces(xs, subject.chunk_size * subject.stride)
        ]
    return spread(times[before : before + CHUNKS])


def time_hour(subject: Subject, sound: Sound, minutes: int = 60) -> list[Minute]:
    """The profile's `hour`: a stream of so many minutes, the median of a chunk in each."""
    xs = features(subject, sound.clip(60))
    size = subject.chunk_size * subject.stride
    endless = cycle(list(pieces(xs, size)))
    done, heard, rows = 0, 0.0, []
    state = subject.init_state()
    with undisturbed():
        for minute in range(1, minutes + 1):
            times = []
            while heard < 60 * minute:
                x = next(endless)
                times.append(milliseconds(subject.device, subject.encoder.forward_chunk, x, state))
                done += 1
                heard = done * subject.chunk_seconds
            rows.append(Minute(minute=minute, chunk_ms=median(times)))
    return rows


class Streamer:
    """Utterances through the streaming recognizer.

    Args:
        subject: of what. Random weights have no words to rescore: CTC alone is searched then.
        options: of OPTIONS.
        engine: what runs encoder and CTC.
    """

    def __init__(
        self, subject: Subject, options: Mapping[str, Any], engine: EngineBuilder = TorchEngine
    ):
        self.subject, self.engine = subject, engine
        defaults = inspect.signature(StreamingRecognizer).parameters
        self.options = {key: options.get(key, defaults[key].default) for key in OPTIONS}
        if not subject.source.trained:
            self.options["ctc_weight"] = 1.0

    def _recognizer(self) -> StreamingRecognizer:
        return StreamingRecognizer(
            asr_model=self.subject.model,
            asr_train_args=self.subject.args,
            chunk_size=self.subject.chunk_size,
            left_chunks=self.subject.left_chunks,
            device=self.subject.device,
            engine=self.engine,
            **self.options,
        )

    def real_time_factor(self, sound: Sound) -> float:
        """Time of all that streaming does over duration, fed in pieces of a chunk."""
        size = round(self.subject.chunk_seconds * sound.rate)
        with undisturbed():
            recognizer = self._recognizer()
            self._stream(Meter(recognizer), sound.utterances[0], size)
            meter = Meter(recognizer)
            for samples in sound.utterances:
                self._stream(meter, samples, size)
        return meter.real_time_factor

    def _stream(self, meter: Meter, samples: Any, size: int) -> None:
        for first in range(0, len(samples), size):
            piece = samples[first : first + size]
            meter.accept(piece, is_final=first + size >= len(samples))
        synchronize(self.subject.device)

    def first_tokens(self, sound: Sound) -> Spread | None:
        """The profile's `first_token_ms`; None for random weights, or where no token came."""
        if not self.subject.source.trained:
            return None
        with undisturbed():
            recognizer = self._recognizer()
            self._first_token(recognizer, sound.utterances[0], sound.rate)
            delays = [self._first_token(recognizer, s, sound.rate) for s in sound.utterances]
        heard = [delay for delay in delays if delay is not None]
        return spread(heard) if heard else None

    def _first_token(self, recognizer: StreamingRecognizer, samples: Any, rate: int):
        """ms until an utterance that arrives frame by frame has a token; None: it never does."""
        recognizer.reset()
        size = round(self.subject.frame_seconds * rate)
        clock = 0.0  # seconds since the first sample
        for first in range(0, len(samples), size):
            piece = samples[first : first + size]
            last = first + size >= len(samples)
            begin = time.perf_counter()
            ended = recognizer.accept(piece, is_final=last)
            synchronize(self.subject.device)
            found = bool(ended) or bool(recognizer.partial[2])
            busy = time.perf_counter() - begin
            clock = max(clock, (first + len(piece)) / rate) + busy
            if found:
                return 1000 * clock
        return None
