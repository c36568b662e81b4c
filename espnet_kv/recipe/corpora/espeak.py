"""Speech from eSpeak NG, through ctypes and the PyPI wheel `espeakng-loader`."""

import ctypes
import functools
import os
import signal
from dataclasses import dataclass

import numpy as np

from espnet_kv.errors import UserError

SAMPLE_RATE = 22050  # all formant voices of eSpeak NG have this rate

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_REINSTALL = "pip install --force-reinstall espeakng-loader"
_ON_SAMPLES = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """A voice file such as `gmw/en-US+f2` and its settings.

    rate: words a minute, 80 to 450. pitch, pitch_range: 0 to 99; 50 is the default of the voice.
    """

    name: str
    rate: int = 175
    pitch: int = 50
    pitch_range: int = 50


def speak(text: str, voice: Voice) -> np.ndarray:
    """Synthesise `text`; return int16 samples (N,) at SAMPLE_RATE, the same on every call.

    eSpeak keeps state between utterances (flutter, random numbers), which cannot be reset.
    Therefore each utterance is synthesised in a fork of the process that has loaded it.

    Raises:
        UserError: espeakng-loader is not installed or cannot be loaded, has no such voice, or
            the fork failed or was killed.
    """
    library = _library()
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        raise UserError(f"eSpeak NG needs a process of its own: {error.strerror}") from None
    if child == 0:
        # The parent reads one byte, then the samples (+) or an error message (-).
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                try:
                    pipe.write(b"+" + _speak_here(library, text, voice))
                except Exception as error:
                    pipe.write(b"-" + str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise UserError(
            f"eSpeak NG was killed by signal {-status} ({signal.strsignal(-status)}) while it "
            f"spoke {text!r} with voice {voice.name!r}; check the memory, and try: {_REINSTALL}"
        )
    if answer[:1] != b"+" or len(answer) == 1:
        reason = answer[1:].decode(errors="replace") or "it gave no samples"
        raise UserError(f"eSpeak NG cannot speak {text!r} with voice {voice.name!r}: {reason}")
    return np.frombuffer(answer, dtype=np.int16, offset=1)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "the synth corpus is spoken by eSpeak NG: pip install espeakng-loader"
        ) from None
    try:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except OSError as error:
        raise UserError(f"eSpeak NG cannot be loaded: {error}; try: {_REINSTALL}") from None
    data = espeakng_loader.get_data_path()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT)
    if rate != SAMPLE_RATE:
        raise UserError(
            f"eSpeak NG cannot read its data in {data} (it fails on very long paths); "
            f"try: {_REINSTALL}"
        )
    return library


def _speak_here(library: ctypes.CDLL, text: str, voice: Voice) -> bytes:
    chunks = []

    @_ON_SAMPLES
    def on_samples(samples, count, _events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(on_samples)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the default seed is the clock
    if library.espeak_SetVoiceByName(voice.name.encode()):
        raise ValueError(f"it has no such voice; try: {_REINSTALL}")
    results = []
    settings = {_RATE: voice.rate, _VOLUME: 100, _PITCH: voice.pitch, _RANGE: voice.pitch_range}
    results += [library.espeak_SetParameter(key, value, 0) for key, value in settings.items()]
    spoken = text.encode()
    results.append(library.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, _UTF8, None, None))
    if any(results):
        raise ValueError(f"error codes {results}; check the text and the voice's settings")
    return b"".join(chunks)
