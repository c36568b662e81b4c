"""Calibration audio: its selection, and running a model on it. No transcripts are needed.

The decoder input is the model's own greedy search result instead of a transcript.
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
# every fifth utterance is held out from the fit, to measure errors on it
HELD_OUT = 5
# seconds; shorter utterances may be too short for the encoder and carry little information
SHORTEST = 0.5
# limit of greedy search, in tokens per encoder frame
TOKENS_PER_FRAME = 1.0


@dataclass(frozen=True)
class Calibration:
    """Calibration utterances, each (N,) samples at the sampling rate of the model's frontend.

    fit: utterances that the conversion is fitted to.
    held_out: utterances that its errors are measured on.
    source: origin of the audio, recorded in conversion.json.
    """

    fit: Sequence[Tensor]
    held_out: Sequence[Tensor]
    source: dict[str, Any]


def read_calibration(
    scp: Path, kind: str, minutes: float, seed: int, args: Any, task: Any
) -> Calibration:
    """Draw random utterances from a wav.scp until there are `minutes` of audio.

    Audio with another sampling rate is resampled. Utterances shorter than SHORTEST are left out
    and listed in `source`.

    Args:
        scp: a wav.scp.
        kind: kaldi_ark or sound, as in ESPnet's --train_data_path_and_name_and_type.
        seed: for the choice of utterances, including those held out.
        args: the model's training arguments; samples are preprocessed as for decoding.
        task: the ESPnet task class.

    Raises:
        UserError: fewer than two utterances are long enough, or a file cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: allowed: {', '.join(KINDS)}")
    entries = read_scp(scp)
    utterances = sorted(entries)
    random.Random(seed).shuffle(utterances)
    preprocess = task.build_preprocess_fn(args, False)
    rate = model_rate(args.frontend_conf)
    samples_needed, samples, selected = minutes * 60 * rate, 0, []
    short: list[str] = []
    notes: set[str] = set()
    for utterance in utterances:
        if samples >= samples_needed:
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
            selected.append(torch.from_numpy(np.asarray(speech, dtype=np.float32)))
            samples += len(speech)
        else:
            short.append(utterance)
    if len(selected) < 2:
        raise UserError(
            f"{scp}: {len(selected)} utterance is too few: the fit and the held-out errors need "
            f"one each ({len(short)} shorter than {SHORTEST} s were left out); give more audio or "
            "more minutes"
        )
    held_out = selected[HELD_OUT - 1 :: HELD_OUT] or selected[-1:]
    fit = [x for x in selected if not any(x is y for y in held_out)]
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


class CalibrationRunner:
    """Runs a model on calibration audio, one utterance at a time.

    Args:
        model: the ESPnet model, in eval mode.
        decoding: whether to run the decoder too.
    """

    def __init__(self, model: Any, decoding: bool):
        self._model, self._decoding = model, decoding
        self._tokens: dict[int, Tensor] = {}

    def transcribe(self, utterances: Sequence[Tensor], step: Callable[[], object]) -> None:
        """Find the decoder input of each utterance by greedy search; `run` needs it.

        Call it before the calls of attention modules are recorded. step: called after each.
        """
        for speech in utterances if self._decoding else ():
            encoded, _ = self._encode(speech)
            self._tokens[id(speech)] = greedy_tokens(self._model, encoded[0])
            step()

    @torch.no_grad()
    def run(
        self, utterances: Sequence[Tensor], step: Callable[[], object] = lambda: None
    ) -> dict[str, Tensor]:
        """Run the model on utterances. step: called after each.

        Returns:
            Outputs of all utterances, concatenated: "encoder" (frames, D), and with `decoding`
            "decoder" (tokens, V), log-probabilities.
        """
        outputs: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
        for speech in utterances:
            encoded, lengths = self._encode(speech)
            outputs["encoder"].append(encoded[0])
            if self._decoding:
                tokens = self._tokens[id(speech)][None]  # (1, L), <sos> first
                token_lengths = torch.tensor([tokens.size(1)])
                scores, _ = self._model.decoder(encoded, lengths, tokens, token_lengths)
                outputs["decoder"].append(scores[0].log_softmax(dim=-1))
            step()
        return {module: torch.cat(parts) for module, parts in outputs.items() if parts}

    @torch.no_grad()
    def _encode(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        encoded, lengths = self._model.encode(speech[None], torch.tensor([len(speech)]))
        encoded = encoded[0] if isinstance(encoded, tuple) else encoded
        if not torch.isfinite(encoded).all():
            raise UserError(
                "the encoder's output on the calibration audio is infinite or not a number: the "
                "training of the model diverged; use the model of an earlier epoch"
            )
        return encoded, lengths


@torch.no_grad()
def greedy_tokens(model: Any, encoded: Tensor) -> Tensor:
    """Greedy search: (L,) tokens, <sos> first, without <eos>.

    Args:
        model: the ESPnet model, with a kv_transformer decoder.
        encoded: (T, D) encoder output.
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
