"""What the server holds of a client: audio that waits for decoding, results that wait for sending.

Both are bounded. A client that sends faster than it is decoded is not read any further, and one
that does not read its results is not decoded any further.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from espnet_kv.streaming.transcript import DIGITS, Result

MOST_RESULTS = 16
"""Results that wait for sending; with more, the stream is not decoded any further."""

JOINED = 1600
"""Shorter messages are joined to this many samples, as every array that waits needs memory."""


class Piece(NamedTuple):
    """Samples (N,) of a stream for one step; the stream ends with the last piece.

    Attributes:
        arrived: time.monotonic() at the arrival of the last sample.
    """

    samples: np.ndarray
    is_last: bool
    arrived: float


class Client:
    """The stream of one client. Only the event loop may call its methods.

    Args:
        number: its name in the log.
        sizes: samples of the first piece, and of every other piece; both complete one chunk.
        most_waiting: samples that may wait before `room` blocks.
        wake: called when the stream may have become ready for a step.

    Attributes:
        samples: number of samples received.
        served: number of the last step in which the stream took part.
        ready_since: time.monotonic() when the stream became ready for its next step, if it is.
        segments: number of segments that ended; only the thread of the decoder changes it.
        failed: decoding failed.
    """

    def __init__(
        self, number: int, sizes: tuple[int, int], most_waiting: int, wake: Callable[[], None]
    ):
        self._number = number
        self.samples = self.served = self.segments = 0
        self.failed = False
        self.ready_since: float | None = None
        self._size, self._next_size = sizes
        self._most_waiting, self._wake = most_waiting, wake
        self._audio: deque[tuple[np.ndarray, float]] = deque()
        self._waiting = 0  # samples in `_audio`
        self._is_complete = self._is_over = False  # no more audio, no more results
        self._results: deque[tuple[str, bool]] = deque()  # and whether a newer one replaces it
        self._has_room, self._has_result = asyncio.Event(), asyncio.Event()
        self._has_room.set()

    def __str__(self) -> str:
        return str(self._number)

    def accept(self, samples: np.ndarray) -> None:
        """Take samples (N,) that arrived."""
        self.samples += len(samples)
        self._waiting += len(samples)
        if self._audio and len(self._audio[-1][0]) < JOINED:
            samples = np.concatenate([self._audio.pop()[0], samples])
        if len(samples):
            self._audio.append((samples, time.monotonic()))
        if self._waiting >= self._most_waiting:
            self._has_room.clear()
        self._note_readiness()

    async def room(self) -> None:
        """Wait until there is room for more samples."""
        await self._has_room.wait()

    def complete(self) -> None:
        """No more samples will come; the stream ends with those that wait."""
        self._is_complete = True
        self._note_readiness()

    @property
    def is_ready(self) -> bool:
        """Whether the stream has a piece for a step."""
        if self._is_over or len(self._results) >= MOST_RESULTS:
            return False
        return self._is_complete or self._waiting >= self._size

    @property
    def is_late(self) -> bool:
        """Whether a stream that is ready has the samples of two steps, or ends."""
        return self._is_complete or self._waiting >= self._size + self._next_size

    def take(self) -> Piece:
        """The piece for the next step of a stream that is ready."""
        is_last = self._is_complete and self._waiting <= self._size
        left = wanted = min(self._size, self._waiting)
        parts, arrived = [np.zeros(0, np.float32)], time.monotonic()
        while left > 0:
            samples, arrived = self._audio.popleft()
            parts.append(samples[:left])
            if len(samples) > left:
                self._audio.appendleft((samples[left:], arrived))
            left -= len(parts[-1])
        self._waiting -= wanted
        self._size = self._next_size
        self.ready_since = time.monotonic() if self.is_ready else None
        if self._waiting < self._most_waiting:
            self._has_room.set()
        return Piece(np.concatenate(parts), is_last, arrived)

    def put(self, results: Iterable[tuple[str, bool]], is_over: bool = False) -> None:
        """Take results to be sent: (text, whether the next result replaces it unless sent)."""
        for result in results:
            if self._results and self._results[-1][1]:
                self._results.pop()
            self._results.append(result)
        self._is_over |= is_over
        self._has_result.set()

    async def result(self) -> str | None:
        """Wait for the next result to be sent; None: there are no more."""
        while not self._results:
            if self._is_over:
                return None
            self._has_result.clear()
            await self._has_result.wait()
        text, _ = self._results.popleft()
        self._note_readiness()
        return text

    def _note_readiness(self) -> None:
        if self.ready_since is None and self.is_ready:
            self.ready_since = time.monotonic()
        self._wake()

    def fail(self) -> None:
        """Decoding failed: no more results."""
        self.failed = True
        self.put((), is_over=True)


def message(
    result: Result, segment: int, latency: float, is_final: bool = False, is_eof: bool = False
) -> str:
    """A result as JSON, with the names of sherpa-onnx's OnlineRecognizerResult and some more.

    Args:
        segment: number of the segment in the stream.
        latency: seconds from the arrival of the audio to this result.
        is_final: the segment ended. is_eof: the stream ended.
    """
    content = result.as_dict()
    return json.dumps(
        {
            "text": " ".join(result.token) if result.text is None else result.text,
            "tokens": result.token,
            "timestamps": [round(token.start - result.start, DIGITS) for token in result.tokens],
            "segment": segment,
            "start_time": content["start"],
            "is_final": is_final,
            "is_eof": is_eof,
            "end_time": content["end"],
            "words": content["words"],
            "latency": round(latency, DIGITS),
        },
        ensure_ascii=False,
    )
