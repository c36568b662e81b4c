"""Audio beyond the window of Whisper, decoded in parts."""

import math
import sys
from collections.abc import Sequence
from itertools import chain

import torch
from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder
from espnet2.bin.asr_inference import Hypothesis
from torch import Tensor, nn
from torch.nn import functional

from espnet_kv.espnet.openai_whisper import SAMPLE_RATE

PAUSE = SAMPLE_RATE // 4
"""Samples that are quiet together where audio is cut."""
STEP = SAMPLE_RATE // 100
"""Samples between two places where it may be cut."""


def most_samples(model: nn.Module) -> int:
    """Samples that the encoder of an ASR model takes at once, as whole frames."""
    encoder = model.encoder
    if not isinstance(encoder, OpenAIWhisperEncoder):
        return sys.maxsize
    frames = 2 * len(encoder.encoders.positional_embedding)  # the second convolution halves them
    return (frames + 1) * encoder.hop_length - 1


def windows(speech: Tensor, most: int) -> list[Tensor]:
    """Cut audio where it is quietest, into as few parts as possible.

    Args:
        speech: (N,) samples. most: samples of a part, of some seconds.

    Returns:
        The parts, of about the same length; the audio itself where it is short enough.
    """
    parts = []
    while len(speech) > most:
        count = math.ceil(len(speech) / most)
        middle = len(speech) // count
        first = max(middle - most // 6, len(speech) - (count - 1) * most)
        last = min(middle + most // 6, most)
        near = speech[first - PAUSE // 2 : last + PAUSE // 2].float()
        power = functional.avg_pool1d(near.square()[None, None], PAUSE, STEP)[0, 0]
        cut = first + STEP * int(power.argmin())
        parts.append(speech[:cut])
        speech = speech[cut:]
    return [*parts, speech]


def joined(results: Sequence[Sequence[tuple]]) -> list[tuple]:
    """The n-best list of audio from those of its parts: the best of each, the second best, ...

    Texts are joined by a space and scores added. `yseq` has those of the parts one after the other,
    each from <sos> to <eos>.

    Args:
        results: for each part, ESPnet's n-best list of text, tokens, token ids and hypothesis.
    """
    if len(results) == 1:
        return list(results[0])
    return [_joined(*zip(*ranked, strict=True)) for ranked in zip(*results, strict=False)]


def _joined(
    texts: Sequence[str | None],
    tokens: Sequence[list[str]],
    ids: Sequence[list[int]],
    hypotheses: Sequence[Hypothesis],
) -> tuple[str | None, list[str], list[int], Hypothesis]:
    said = [text.strip() for text in texts if text is not None]
    names = getattr(hypotheses[0], "scores", {})  # those of a transducer have none
    hypothesis = Hypothesis(
        yseq=torch.cat([torch.as_tensor(one.yseq) for one in hypotheses]),
        score=sum(one.score for one in hypotheses),
        scores={name: sum(one.scores[name] for one in hypotheses) for name in names},
    )
    text = " ".join(filter(None, said)) if said else None
    return text, list(chain.from_iterable(tokens)), list(chain.from_iterable(ids)), hypothesis
