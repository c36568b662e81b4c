"""The beam search of whole utterances: its time, and what the decoder keeps while it runs."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from espnet2.bin import asr_inference as espnet
from torch import Tensor
from typeguard import TypeCheckError

from espnet_kv.cache import FrameState
from espnet_kv.decoder.cached import CachedDecoder
from espnet_kv.decoder.search import Search
from espnet_kv.decoder.whisper_decoder import KVWhisperDecoder
from espnet_kv.errors import ArgumentError, ConfigError, one_line
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer
from espnet_kv.espnet.inference import limit_length
from espnet_kv.espnet.openai_whisper import with_whisper
from espnet_kv.espnet.parser import check_numbers
from espnet_kv.espnet.replacing import replaced
from espnet_kv.profile import schema
from espnet_kv.profile.analytic import decoder_bytes
from espnet_kv.profile.cache_bytes import check
from espnet_kv.profile.clock import median, milliseconds, spread, undisturbed
from espnet_kv.profile.sound import Sound
from espnet_kv.profile.subject import Subject

# a search on random weights emits so many tokens for a second of audio, about as many as speech
# has pieces of a vocabulary of 5000
TOKENS_PER_SECOND = 3
KINDS = {"self": "decoder_self", "cross": "decoder_cross"}
OPTIONS = ("beam_size", "ctc_weight", "penalty", "maxlenratio", "minlenratio")
"""What of an inference configuration plays a part here."""


def search_options(subject: Subject, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of OPTIONS, with ESPnet's defaults.

    Args:
        subject: what is searched with.
        options: of an inference configuration.

    Raises:
        ConfigError: an option cannot be used.
    """
    defaults = inspect.signature(espnet.Speech2Text).parameters
    known = {key: options.get(key, defaults[key].default) for key in OPTIONS}
    try:
        check_numbers(**known)
    except ArgumentError as error:  # a key of a YAML and no option of a command
        raise ConfigError(str(error)) from error
    if known["beam_size"] > (tokens := len(subject.model.token_list)):
        raise ConfigError(
            f"beam_size: {known['beam_size']} is more than the {tokens} tokens of the model; give "
            "a smaller one"
        )
    return known


class Recognizer:
    """ESPnet's Speech2Text of an already loaded model, with our CTC scorer and cached decoder.

    Args:
        subject: what it recognizes with.
        options: of OPTIONS.

    Raises:
        ConfigError: an option cannot be used.
    """

    def __init__(self, subject: Subject, options: Mapping[str, Any]):
        self.subject = subject
        self.options = search_options(subject, options)
        with _of_the_loaded_model(subject):
            try:
                with with_whisper(vars(subject.args)):
                    self.speech2text = espnet.Speech2Text(device=subject.device, **self.options)
                limit_length(self.speech2text)
            except (TypeError, TypeCheckError) as error:
                raise ConfigError(one_line(error)) from error
        if isinstance(subject.model.decoder, CachedDecoder):
            subject.model.decoder.prepare_search()  # as the command does
        self._never_ends = False
        if not subject.source.trained:
            self._force_length()

    def _force_length(self) -> None:
        """Keep hypotheses of random weights from ending by themselves."""
        decoder = self.subject.model.decoder
        output = getattr(decoder, "output_layer", None)
        if output is not None:
            with torch.no_grad():
                output.bias[self.subject.model.eos] -= 10000
        # Whisper's scores have no bias, but of its many tokens <|endoftext|> is hardly ever one
        self._never_ends = output is not None or isinstance(decoder, KVWhisperDecoder)

    def __call__(self, samples: np.ndarray | Tensor) -> list:
        """N-best results of (N,) samples."""
        if self._never_ends:
            seconds = len(samples) / self.subject.sample_rate
            self.speech2text.maxlenratio = -float(math.ceil(TOKENS_PER_SECOND * seconds))
        with self.subject.offline():
            return self.speech2text(samples)


@contextmanager
def _of_the_loaded_model(subject: Subject) -> Iterator[None]:
    """Within it ESPnet's inference module builds searches of the loaded model."""

    class Loaded:
        """Stands in for the task."""

        @staticmethod
        def build_model_from_file(*_: Any) -> tuple[Any, Any]:
            return subject.model, subject.args

    with replaced(espnet, ASRTask=Loaded, CTCPrefixScorer=FastCTCPrefixScorer):
        yield


def time_utterances(
    recognizer: Recognizer, sound: Sound, repeats: int
) -> tuple[schema.Spread, float]:
    """Time in ms of an utterance (of its repeats the median counts), and real-time factor."""
    device = recognizer.subject.device
    recognizer(sound.utterances[0])
    times = []
    with undisturbed():
        for samples in sound.utterances:
            runs = [milliseconds(device, recognizer, samples) for _ in range(repeats)]
            times.append(median(runs))
    return spread(times), sum(times) / 1000 / sound.seconds


@dataclass
class Watched:
    """What a search did, and what it held after each of its steps."""

    steps: list["SearchStep"] = field(default_factory=list)


@dataclass(frozen=True)
class SearchStep:
    """After a token.

    Attributes:
        hypotheses: that took it.
        living: hypotheses that the search knows.
        stored: tokens in the store, where there is one.
        frames: of the utterance.
        held: bytes by kind.
        allocated: bytes of the storage, by the same kinds.
    """

    hypotheses: int
    living: int
    stored: int
    frames: int
    held: dict[str, int]
    allocated: dict[str, int]

    @classmethod
    def of(cls, search: Search, hypotheses: int) -> "SearchStep":
        """As the search is now."""
        stores = [state for state in search.states if isinstance(state, FrameState)]
        stored = sum(search.held) if stores else 0
        held, allocated = (
            {KINDS[kind]: count for kind, count in counts.items()}
            for counts in (search.nbytes_by_kind(), search.capacity_by_kind())
        )
        return cls(hypotheses, search.living, stored, search.frames, held, allocated)


@contextmanager
def watch(decoder: CachedDecoder) -> Iterator[Watched]:
    """See what a search asks of the decoder within it."""
    watched = Watched()
    score = decoder.batch_score

    def batch_score(ys: Tensor, states: Any, *args: Any, **kwargs: Any) -> Any:
        scores, new = score(ys, states, *args, **kwargs)
        watched.steps.append(SearchStep.of(new[0].search, len(ys)))
        return scores, new

    decoder.batch_score = batch_score  # type: ignore[method-assign]
    try:
        yield watched
    finally:
        del decoder.batch_score


def measure_decoder(recognizer: Recognizer, samples: np.ndarray) -> schema.DecoderCache | None:
    """The profile's `decoder_cache`, of one utterance; None without a cached decoder.

    Raises:
        MismatchError: the search does not hold what arithmetic says.
    """
    decoder = recognizer.subject.model.decoder
    if not isinstance(decoder, CachedDecoder):
        return None
    with watch(decoder) as watched:
        recognizer(samples)
    if not watched.steps:
        return None  # CTC alone
    most = max(watched.steps, key=lambda step: step.held["decoder_self"])
    size = recognizer.subject.encoder.output_size()
    analytic = decoder_bytes(
        decoder_conf(recognizer.subject), size, most.stored, most.living, most.frames
    )
    check(most.held, analytic, f"decoder, {most.stored} tokens, {most.frames} frames")
    return schema.DecoderCache(
        hypotheses=max(step.hypotheses for step in watched.steps),
        tokens=len(watched.steps),
        frames=most.frames,
        bytes=schema.DecoderKinds(**most.held),
        analytic=schema.DecoderKinds(**analytic),
        allocated=schema.DecoderKinds(**most.allocated),
        bytes_per_token=most.held["decoder_self"] / most.stored if most.stored else 0.0,
        bytes_per_frame=_per_frame(recognizer.subject, most.frames),
    )


def decoder_conf(subject: Subject) -> dict[str, Any]:
    """Every argument of a cached decoder."""
    parameters = inspect.signature(type(subject.model.decoder)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return defaults | dict(subject.args.decoder_conf)


def _per_frame(subject: Subject, frames: int) -> float:
    """Bytes that an encoder frame adds to what cross-attention keeps."""
    xs = torch.zeros(1, frames + 1, subject.encoder.output_size(), device=subject.device)
    with torch.no_grad():
        shorter, longer = (
            Search(subject.model.decoder, xs[:, :length], None).nbytes_by_kind()["cross"]
            for length in (frames, frames + 1)
        )
    return float(longer - shorter)
