"""Measurement of streaming: real-time factor and bytes held."""

import time

import numpy as np
from torch import Tensor

from espnet_kv.cache import KINDS
from espnet_kv.streaming.recognizer import Result, StreamingRecognizer


class Meter:
    """Measures the time of a recognizer.

    Attributes:
        audio_seconds: duration of the audio so far.
        busy_seconds: time of recognition so far.
    """

    def __init__(self, recognizer: StreamingRecognizer):
        self.recognizer = recognizer
        self.audio_seconds = self.busy_seconds = 0.0

    def accept(self, speech: Tensor | np.ndarray, is_final: bool = False) -> list[list[Result]]:
        """Call the recognizer's `accept` and measure its time."""
        start = time.perf_counter()
        try:
            return self.recognizer.accept(speech, is_final)
        finally:
            self.busy_seconds += time.perf_counter() - start
            self.audio_seconds += len(speech) / self.recognizer.sample_rate

    @property
    def real_time_factor(self) -> float:
        """Seconds of recognition per second of audio."""
        return self.busy_seconds / max(self.audio_seconds, 1e-9)

    @property
    def cache_nbytes(self) -> int:
        """Bytes in use in the encoder's cache."""
        held = self.recognizer.nbytes_by_kind()
        return sum(held[kind] for kind in KINDS)

    def summary(self) -> str:
        """One line: real-time factor and peak bytes between two pieces, by kind."""
        peak = self.recognizer.peak_nbytes
        kinds = ", ".join(f"{kind} {count}" for kind, count in peak.items())
        return (
            f"real-time factor {self.real_time_factor:.3f} ({self.busy_seconds:.1f} s for "
            f"{self.audio_seconds:.1f} s of audio), cache at most "
            f"{sum(peak.get(kind, 0) for kind in KINDS)} bytes (held in all: {kinds or 'nothing'})"
        )
