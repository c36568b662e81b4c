"""Audio that shows a conversion what attention meets; no transcripts are needed.

The decoder hears its own words: what it finds by greedy search stands in for the text.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.errors import UserError
from espnet_kv.streaming.recordings import model_rate, read_scp, read_utterance

KINDS = ("kaldi_ark", "sound")
# one utterance in so many is kept from the fit, to measure errors on
HELD_OUT = 5
# seconds; what is shorter may be too short for the encoder, and says little
SHORTEST = 0.5
# greedy search gives up at so many tokens per encoder frame
TOKENS_PER_FRAME = 1.0


@dataclass(frozen=True)
class Calibration:
    """Utterances: (N,) samples as the model's frontend takes them.

    fit: what a conversion is fitted to. held_out: what its errors are measured on. source: where
    they come from, for the record.
    """

    fit: Sequence[Tensor]
    held_out: Sequence[Tensor]
    source: dict[str, Any]


def read_calibration(
    scp: Path, kind: str, minutes: float, seed: int, args: Any, task: Any
) -> Calibration:
    """Draw utterances from a wav.scp until there are `minutes` of audio.

    Audio of another rate is resampled. Utterances shorter than SHORTEST are left out and named in
    `source`.

    Args:
        scp: a wav.scp.
        kind: kaldi_ark or sound, as in ESPnet's --train_data_path_and_name_and_type.
        seed: of the drawing, and of which utterances are held out.
        args: the model's training arguments; samples are read and prepared as for decoding.
        task: the ESPnet task.

    Raises:
        UserError: fewer than two utterances, or a file that cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: allowed are {', '.join(KINDS)}")
    entries = read_scp(scp)
    utterances = sorted(entries)
    random.Random(seed).shuffle(utterances)
    preprocess = task.build_preprocess_fn(args, False)
    rate = model_rate(args.frontend_conf)
    wanted, samples, taken = minutes * 60 * rate, 0, []
    short: list[str] = []
    notes: set[str] = set()
    for utterance in utterances:
        if samples >= wanted:
            break
        try:
            speech = read_utterance(entries[utterance], kind, rate, note=notes.add)
        except UserError as error:
            raise UserError(
                f"{scp}: {utterance}: {error} (read as {kind}; kinds: {', '.join(KINDS)})"
            ) from error
        if preprocess is not None:
            speech = preprocess(utterance, {"speech": speech})["speech"]
        if len(speech) >= SHORTEST * rate:
            taken.append(torch.from_numpy(np.asarray(speech, dtype=np.float32)))
            samples += len(speech)
        else:
            short.append(utterance)
    if len(taken) < 2:
        raise UserError(
            f"{scp}: {len(taken)} utterance is too few: one is fitted to and another measured on "
            f"({len(short)} shorter than {SHORTEST} s were left out); give more audio or more "
            "minutes"
        )
    held_out = taken[HELD_OUT - 1 :: HELD_OUT] or taken[-1:]
    fit = [x for x in taken if not any(x is y for y in held_out)]
    return Calibration(
        fit,
        held_out,
        {
            "scp": str(scp),
            "type": kind,
            "seed": seed,
            "utterances": {"fit": len(fit), "held_out": len(held_out)},
            "notes": sorted(notes),
            "left_out": {f"shorter than {SHORTEST} s": short},
            "seconds": {"fit": _seconds(fit, rate), "held_out": _seconds(held_out, rate)},
        },
    )


def _seconds(utterances: Sequence[Tensor], rate: int) -> float:
    return round(sum(map(len, utterances)) / rate, 2)


class Listener:
    """A model that calibration audio is pushed through, utterance by utterance.

    Args:
        model: the ESPnet model, in eval mode.
        decoding: whether its decoder runs too.
    """

    def __init__(self, model: Any, decoding: bool):
        self._model, self._decoding = model, decoding
        self._words: dict[int, Tensor] = {}

    def learn_words(self, utterances: Sequence[Tensor], step: Callable[[], object]) -> None:
        """Find the tokens of utterances; afterwards the decoder can hear them.

        Call it before anything watches the attention modules. step: called after each.
        """
        for speech in utterances if self._decoding else ():
            encoded, _ = self._encode(speech)
            self._words[id(speech)] = greedy_tokens(self._model, encoded[0])
            step()

    @torch.no_grad()
    def hear(
        self, utterances: Sequence[Tensor], step: Callable[[], object] = lambda: None
    ) -> dict[str, Tensor]:
        """Push utterances through the model. step: called after each.

        Returns:
            What comes out: {"encoder": (frames, D)} and, where it runs, {"decoder": (tokens, V)},
            log-probabilities.
        """
        heard: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
        for speech in utterances:
            encoded, lengths = self._encode(speech)
            heard["encoder"].append(encoded[0])
            if self._decoding:
                words = self._words[id(speech)][None]  # (1, L), <sos> first
                words_length = torch.tensor([words.size(1)])
                scores, _ = self._model.decoder(encoded, lengths, words, words_length)
                heard["decoder"].append(scores[0].log_softmax(dim=-1))
            step()
        return {module: torch.cat(parts) for module, parts in heard.items() if parts}

    @torch.no_grad()
    def _encode(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        encoded, lengths = self._model.encode(speech[None], torch.tensor([len(speech)]))
        encoded = encoded[0] if isinstance(encoded, tuple) else encoded
        if not torch.isfinite(encoded).all():
            raise UserError(
                "the encoder's output on the calibration audio is infinite or no number: the "
                "training of the model diverged; use the model of an earlier epoch"
            )
        return encoded, lengths


@torch.no_grad()
def greedy_tokens(model: Any, encoded: Tensor) -> Tensor:
    """<sos> and the tokens that the decoder finds most likely, one after another: (L,).

    Args:
        model: with a kv_transformer decoder.
        encoded: (T, D).
    """
    decoder: KVTransformerDecoder = model.decoder
    tokens = torch.tensor([model.sos], device=encoded.device)
    state = decoder.init_state(encoded)
    for _ in range(max(1, int(TOKENS_PER_FRAME * len(encoded)))):
        scores, state = decoder.score(tokens, state, encoded)
        best = scores.argmax()
        if best == model.eos:
            break
        tokens = torch.cat([tokens, best[None]])
    return tokens
