"""Calibration audio: its selection, and running a model on it. No transcripts are needed.

Instead of transcripts, the decoder's inputs are results of its own greedy search and disturbed
copies of them: a converted decoder makes errors, and then has to go on from prefixes that the
search of the source does not contain. The copies also give the decoder's attention more queries
per utterance, of which there are few.
"""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet_kv.decoder.cached import CachedDecoder
from espnet_kv.errors import UserError
from espnet_kv.espnet.openai_whisper import whisper_package
from espnet_kv.streaming.recordings import entry_kind, model_rate, read_scp, read_utterance

KINDS = ("kaldi_ark", "sound")
# every fifth utterance is held out from the fit, to measure errors on it
HELD_OUT = 5
# seconds; shorter utterances may be too short for the encoder and carry little information
SHORTEST = 0.5
# disturbed copies of each decoder input, and the share of their tokens that is disturbed
COPIES, DISTURBANCE = 2, 0.3
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
    scp: Path, kind: str | None, minutes: float, seed: int, args: Any, task: Any
) -> Calibration:
    """Draw random utterances from a wav.scp until there are `minutes` of audio.

    Audio with another sampling rate is resampled. Utterances shorter than SHORTEST are left out
    and listed in `source`.

    Args:
        scp: a wav.scp.
        kind: kaldi_ark or sound, as in ESPnet's --train_data_path_and_name_and_type. None: what
            each entry is.
        seed: for the choice of utterances, including those held out.
        args: the model's training arguments; samples are preprocessed as for decoding.
        task: the ESPnet task class.

    Raises:
        UserError: fewer than two utterances are long enough, or a file cannot be read.
    """
    if kind not in (*KINDS, None):
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
                f"{scp}: {utterance}: {error} "
                f"(read as {kind or entry_kind(entries[utterance])}; kinds: {', '.join(KINDS)})"
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
        start: tokens that every decoder input begins with (`start_tokens`); empty: <sos>.
        seed: for the disturbed decoder inputs.
    """

    def __init__(self, model: Any, decoding: bool, start: Sequence[int] = (), seed: int = 0):
        self._model, self._decoding, self._seed = model, decoding, seed
        self._start = list(start) or [model.sos]
        self._encoded: dict[int, tuple[Tensor, Tensor]] = {}
        self._texts: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def transcribe(self, utterances: Sequence[Tensor], step: Callable[[], object]) -> None:
        """Find the decoder inputs of each utterance; `run` needs them.

        Call it before the calls of attention modules are recorded. step: called after each.
        """
        greedy: dict[int, Tensor] = {}
        for speech in utterances if self._decoding else ():
            encoded, lengths = self._encode(speech)
            self._encoded[id(speech)] = encoded, lengths
            greedy[id(speech)] = greedy_tokens(self._model, encoded, self._start)[0]
            step()
        generator, first = torch.Generator().manual_seed(self._seed), len(self._start)
        for key, tokens in greedy.items():
            others = torch.cat(list(greedy.values()))
            copies = [disturbed(tokens[first:], others, generator) for _ in range(COPIES)]
            texts = [tokens, *(torch.cat([tokens[:first], copy]) for copy in copies)]
            self._texts[key] = [text[: _most_tokens(self._model)] for text in texts]

    @torch.no_grad()
    def run(
        self,
        utterances: Sequence[Tensor],
        step: Callable[[], object] = lambda: None,
        modules: Sequence[str] = ("encoder", "decoder"),
    ) -> dict[str, Tensor]:
        """Run the model on utterances.

        Args:
            step: called after each utterance.
            modules: without "encoder", the decoder gets the encoder output from `transcribe`.

        Returns:
            Outputs of all utterances, concatenated: "encoder" (frames, D), and with `decoding`
            "decoder" (tokens, V), log-probabilities.
        """
        outputs: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
        for speech in utterances:
            for module, output in self._outputs(speech, modules):
                outputs[module].append(output)
            step()
        return {module: torch.cat(parts) for module, parts in outputs.items() if parts}

    def backward(
        self,
        utterances: Sequence[Tensor],
        step: Callable[[], object] = lambda: None,
        modules: Sequence[str] = ("encoder", "decoder"),
    ) -> None:
        """Run the model and propagate gradients back to recorded calls of attention modules.

        A decoder's output is the log-probability of tokens that are drawn from its distributions.
        The mean square of its change is the Fisher information: twice the divergence that a small
        error causes, in nats. An encoder's output is projected on Gaussian noise, which gives the
        squared error of all its numbers. Encoder and decoder are separate: no gradient passes from
        a decoder to the encoder.

        Args:
            utterances, step, modules: see `run`.
        """
        generator = torch.Generator().manual_seed(self._seed)
        with _frozen(self._model), torch.enable_grad():
            for speech in utterances:
                for module, output in self._outputs(speech, modules):
                    if not output.requires_grad:  # nothing was recorded in this module
                        continue
                    if module == "decoder":
                        probabilities = output.detach().exp().cpu()
                        drawn = torch.multinomial(probabilities, 1, generator=generator)
                        output.gather(1, drawn.to(output.device)).sum().backward()
                    else:
                        noise = torch.randn(output.shape, generator=generator)
                        (output * noise.to(output)).sum().backward()
                step()

    def _outputs(self, speech: Tensor, modules: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """("encoder", (frames, D)) and ("decoder", (tokens, V)) of each decoder input."""
        key = id(speech)
        encoder = "encoder" in modules or key not in self._encoded
        encoded, lengths = self._encode(speech) if encoder else self._encoded[key]
        yield "encoder", encoded[0]
        for tokens in self._texts[key] if self._decoding and "decoder" in modules else ():
            inputs, sizes = tokens[None], torch.tensor([len(tokens)])  # (1, L), <sos> first
            scores, _ = self._model.decoder(encoded.detach(), lengths, inputs, sizes)
            yield "decoder", scores[0].log_softmax(dim=-1)

    def _encode(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        encoded, lengths = self._model.encode(speech[None], torch.tensor([len(speech)]))
        encoded = encoded[0] if isinstance(encoded, tuple) else encoded
        if not torch.isfinite(encoded).all():
            raise UserError(
                "the encoder's output on the calibration audio is infinite or not a number: the "
                "training of the model diverged; use the model of an earlier epoch"
            )
        return encoded, lengths


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Context manager within which no parameter of the model requires a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def disturbed(tokens: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of (L,) tokens in which some are replaced, dropped or repeated.

    Each with probability DISTURBANCE / 3.

    Args:
        others: (n,) tokens to draw replacements from.
        generator: of the random numbers.
    """
    length = len(tokens)
    kind = torch.rand(length, generator=generator) / (DISTURBANCE / 3)
    drawn = others[torch.randint(len(others), (length,), generator=generator)]
    copies = torch.ones(length, dtype=torch.long)
    copies[(kind >= 1) & (kind < 2)] = 0
    copies[(kind >= 2) & (kind < 3)] = 2
    return torch.where((kind < 1).to(tokens.device), drawn, tokens).repeat_interleave(
        copies.to(tokens.device)
    )


@torch.no_grad()
def greedy_tokens(model: Any, encoded: Tensor, start: Sequence[int]) -> list[Tensor]:
    """Greedy search of some utterances: (L,) tokens of each, those of `start` first, without <eos>.

    Args:
        model: the ESPnet model, with a kv_transformer or kv_whisper decoder.
        encoded: (B, T, D) encoder output.
    """
    decoder: CachedDecoder = model.decoder
    tokens = torch.tensor(start, device=encoded.device).repeat(len(encoded), 1)  # (B, L)
    states = [decoder.batch_init_state(encoded)] * len(encoded)
    most = max(1, int(TOKENS_PER_FRAME * encoded.size(1)))
    ended = torch.zeros(len(encoded), dtype=torch.bool, device=encoded.device)
    for _ in range(min(most, _most_tokens(model) - len(start))):
        scores, states = decoder.batch_score(tokens, states, encoded)
        best = scores.argmax(dim=1)
        ended |= best == model.eos
        if ended.all():
            break
        tokens = torch.cat([tokens, best[:, None]], dim=1)
    return [_before(row, model.eos, len(start)) for row in tokens]


def _before(tokens: Tensor, end: int, first: int) -> Tensor:
    """(L,) tokens up to the first `end` from position `first` on."""
    ends = (tokens[first:] == end).nonzero()
    return tokens[: first + int(ends[0])] if len(ends) else tokens


def _most_tokens(model: Any) -> int:
    """The longest input of the decoder: Whisper's has a limit."""
    return getattr(model.decoder, "text_positions", sys.maxsize)


def start_tokens(model: Any, config: Mapping[str, Any]) -> list[int]:
    """The tokens that every decoder input begins with: <sos>, or Whisper's language and task.

    Args:
        model: the ESPnet model.
        config: its training configuration.
    """
    kind = str(config.get("token_type"))
    if "whisper" not in kind:
        return [model.sos]
    conf = config.get("preprocessor_conf") or {}
    tokenizer = whisper_package().tokenizer.get_tokenizer(
        multilingual=kind != "whisper_en",
        language=conf.get("whisper_language") or "en",
        task=conf.get("whisper_task") or "transcribe",
    )
    return list(tokenizer.sot_sequence_including_notimestamps)
