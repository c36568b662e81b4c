"""What the model hears: utterances, joined to any length, as samples and as features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espnet_kv.profile.subject import Subject
from espnet_kv.streaming.frontend import StreamingFrontend

# utterances of noise are between these, evenly spread
NOISE_SECONDS = 2.0, 16.0
# features are computed from pieces of so many seconds
PIECE_SECONDS = 10


@dataclass(frozen=True)
class Sound:
    """Utterances.

    name: the wav.scp, or "noise". rate: samples per second. utterances: (N,) float32 each.
    """

    name: str
    rate: int
    utterances: Sequence[np.ndarray]

    @classmethod
    def noise(cls, count: int, rate: int, seed: int) -> "Sound":
        """`count` utterances of white noise, the same for the same seed."""
        generator = np.random.default_rng(seed)
        lengths = np.linspace(*NOISE_SECONDS, count) * rate
        utterances = [0.1 * generator.standard_normal(int(n), dtype=np.float32) for n in lengths]
        return cls("noise", rate, utterances)

    @property
    def seconds(self) -> float:
        """Of all utterances together."""
        return sum(map(len, self.utterances)) / self.rate

    def clip(self, seconds: float) -> Tensor:
        """(N,) samples: the utterances one after the other, again and again, cut at `seconds`."""
        whole = np.concatenate(self.utterances)
        return torch.from_numpy(np.resize(whole, round(seconds * self.rate)))


def features(
    subject: Subject, samples: Tensor, frontend: StreamingFrontend | None = None
) -> Tensor:
    """What the encoder takes, or what another frontend than the subject's gives.

    (T, F) features that a stream of these samples has given so far, without its end; for an encoder
    that makes its features itself, the (N,) samples.
    """
    if not subject.streams:
        return samples.to(subject.device)
    frontend = frontend or subject.frontend()
    pieces = samples.split(PIECE_SECONDS * frontend.sample_rate)
    return torch.cat([frontend(piece.to(subject.device)) for piece in pieces])


def pieces(xs: Tensor, size: int) -> Iterator[Tensor]:
    """xs (T, F) as (1, size, F) each, whole ones only."""
    for first in range(0, len(xs) - size + 1, size):
        yield xs[None, first : first + size]
