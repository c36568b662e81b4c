"""Reverberation, noise and resampling of numpy arrays of float samples (N,)."""

import math

import numpy as np


def resample(signal: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Band-limited resampling by cutting or padding the spectrum, (N,) -> (M,)."""
    # Zero padding gives a length suitable for the FFT and an integer length at both rates.
    block = 8 * rate // math.gcd(rate, new_rate)
    padded = -(-len(signal) // block) * block
    spectrum = np.fft.rfft(signal, padded)
    scale = new_rate / rate
    return np.fft.irfft(spectrum, round(padded * scale))[: round(len(signal) * scale)] * scale


def reverberate(
    signal: np.ndarray, rt60: float, level_db: float, rate: int, rng: np.random.Generator
) -> np.ndarray:
    """Add reverberation: (N,) -> (N,).

    The impulse response is the direct sound plus noise that decays by 60 dB in `rt60` seconds; the
    energy of the noise relative to the direct sound is `level_db`.
    """
    time = np.arange(int(rt60 * rate)) / rate
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    tail[: int(0.002 * rate)] = 0  # delay of the first reflection
    tail *= np.sqrt(10 ** (level_db / 10) / np.sum(tail**2))
    tail[0] = 1
    size = 1 << (len(signal) + len(tail)).bit_length()
    spectrum = np.fft.rfft(signal, size) * np.fft.rfft(tail, size)
    return np.fft.irfft(spectrum, size)[: len(signal)]


def noise(kind: str, size: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit power, (size,). kind: white, pink, or hum (a crowd: the spectrum of speech,
    modulated at the rate of syllables)."""
    fast = 1 << (size - 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(fast))
    frequency = np.fft.rfftfreq(fast, 1 / rate)
    if kind == "pink":
        spectrum /= np.sqrt(np.maximum(frequency, 50))
    elif kind == "hum":
        spectrum /= 1 + (frequency / 500) ** 2
    elif kind != "white":
        raise ValueError(f"noise kind must be white, pink or hum, got {kind!r}")
    result = np.fft.irfft(spectrum, fast)[:size]
    if kind == "hum":
        time = np.arange(size) / rate
        pace, phase = rng.uniform(2, 5), rng.uniform(0, 2 * np.pi)
        result *= 1 + 0.5 * np.sin(2 * np.pi * pace * time + phase)
    return result / np.sqrt(np.mean(result**2))


def add_noise(
    signal: np.ndarray, kind: str, snr_db: float, rate: int, rng: np.random.Generator
) -> np.ndarray:
    """Add noise to `signal` (N,) at the signal-to-noise ratio `snr_db`."""
    level = np.sqrt(np.mean(signal**2)) * 10 ** (-snr_db / 20)
    return signal + level * noise(kind, len(signal), rate, rng)
