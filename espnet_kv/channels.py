"""Several channels of audio as one, alike in the recipe, in decoding and in streaming."""

from collections.abc import Iterable

import numpy as np

CANCELLED = 0.01
"""Channels cancel each other where their mean has less than this part of their power."""


def to_mono(samples: np.ndarray) -> tuple[np.ndarray, str | None]:
    """One channel of (N, channels) samples, and what was done to get it (None: nothing).

    Channels are averaged. Where they cancel each other, as those of a microphone with swapped
    wires do, the first loud one is taken.

    Returns:
        (N,) samples and a note.
    """
    if samples.shape[1] == 1:
        return samples[:, 0], None
    channel = loud_channel([samples])
    if channel is None:
        return samples.mean(axis=1), f"{samples.shape[1]} channels averaged to mono"
    return samples[:, channel].copy(), taken(channel, samples.shape[1])


def taken(channel: int, channels: int) -> str:
    """The note of a channel that was taken because the channels cancel each other."""
    return f"channel {channel} of {channels} taken, because the channels cancel out"


def loud_channel(blocks: Iterable[np.ndarray]) -> int | None:
    """The first loud channel of audio whose channels cancel each other; None: they do not.

    Args:
        blocks: (N, channels) samples, piece by piece.
    """
    powers, of_mean = np.zeros(1), 0.0
    for block in blocks:
        powers = powers + np.square(block, dtype=np.float64).sum(axis=0)
        of_mean += np.square(block.mean(axis=1, dtype=np.float64)).sum()
    if of_mean >= CANCELLED * powers.mean():
        return None
    return int((powers > powers.max() / 2).argmax())
