"""Conversion of multi-channel audio to mono, for the recipe, decoding and streaming."""

from collections.abc import Iterable

import numpy as np

CANCELLED = 0.01
"""Channels cancel each other if the power of their mean is below this fraction of their power."""


def to_mono(samples: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Convert (N, channels) samples to mono.

    Channels are averaged. If they cancel each other (e.g. one has inverted polarity), the first
    loud channel is used.

    Returns:
        (N,) samples and a note on the conversion; None: there was one channel.
    """
    if samples.shape[1] == 1:
        return samples[:, 0], None
    channel = loud_channel([samples])
    if channel is None:
        return samples.mean(axis=1), f"{samples.shape[1]} channels averaged to mono"
    return samples[:, channel].copy(), channel_note(channel, samples.shape[1])


def channel_note(channel: int, channels: int) -> str:
    """The note that one channel was used because the channels cancel each other."""
    return f"channel {channel} of {channels} used, because the channels cancel out"


def loud_channel(blocks: Iterable[np.ndarray]) -> int | None:
    """The first loud channel if the channels cancel each other, else None.

    Args:
        blocks: consecutive samples, (N, channels) each.
    """
    powers, of_mean = np.zeros(1), 0.0
    for block in blocks:
        powers = powers + np.square(block, dtype=np.float64).sum(axis=0)
        of_mean += np.square(block.mean(axis=1, dtype=np.float64)).sum()
    if of_mean >= CANCELLED * powers.mean():
        return None
    return int((powers > powers.max() / 2).argmax())
