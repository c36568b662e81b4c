"""Word error rates of a Whisper model whose attention is converted to mla, without training."""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import positive, print_software, settings
from torch import Tensor

from espnet_kv.bin.convert import PARTS
from espnet_kv.cli import command
from espnet_kv.errors import UserError

METHODS = ("plain SVD", "second moment", "bin.convert")
TOGETHER = {
    "decoder": ("decoder_self", "decoder_cross"),
    "all": PARTS,
}
"""Parts that are converted together, by name."""
BATCH = 10
LONGEST = 30.0  # seconds


class Utterance(NamedTuple):
    """samples: (N,) at 16 kHz. text: the reference."""

    samples: Tensor
    text: str


class WhisperModel(torch.nn.Module):
    """An encoder and a decoder with what `espnet_kv.convert` uses of an ESPnet model."""

    def __init__(self, weights: str):
        super().__init__()
        from espnet_kv.decoder.whisper_decoder import KVWhisperDecoder
        from espnet_kv.encoder.whisper_encoder import KVWhisperEncoder

        self.encoder = KVWhisperEncoder(whisper_model=weights, do_pad_trim=True).eval()
        dims = self.encoder.dims
        size, vocabulary = dims["n_audio_state"], dims["n_vocab"]
        self.decoder = KVWhisperDecoder(vocabulary, size, whisper_model=weights).eval()
        multilingual = vocabulary >= 51865  # as openai-whisper decides
        self.eos = 50257 if multilingual else 50256
        self.sos = self.eos + 1
        self.token_type = "whisper_multilingual" if multilingual else "whisper_en"

    def encode(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Samples (1, N), (1,) -> (1, T, D), (1,)."""
        encoded, lengths, _ = self.encoder(speech, lengths)
        return encoded, lengths


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert self-, cross- and encoder attention of a Whisper model to mla by "
        "three methods, and decode LibriSpeech greedily.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("weights", help="FILE.pt, CTranslate2's model.bin, or a name of openai-whisper")
    add("data", type=Path, help="directory of LibriSpeech's SPEAKER/CHAPTER/*.flac, *.trans.txt")
    add("--utterances", type=positive, default=100, help="number to decode")
    add("--calibration", type=positive, default=64, help="others to fit to; every fifth held out")
    add("--seed", type=int, default=0, help="seed of their choice")
    parts = (*PARTS, *TOGETHER)
    add("--parts", nargs="+", choices=parts, default=parts, help="attention, alone or together")
    add("--cuts", type=float, nargs="+", default=[0.5, 0.75, 0.875, 0.9375], help="that go")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="methods")
    add("--cache_dtypes", nargs="+", default=["fp32"], help="fp32, int8, int4 of the decoder")
    return parser


def read_utterances(data: Path, count: int, seed: int) -> list[Utterance]:
    """`count` random utterances that Whisper encodes whole.

    Args:
        data: a LibriSpeech directory, or a Kaldi data directory at 16 kHz.

    Raises:
        UserError: there are fewer.
    """
    import soundfile

    found = [
        (file, text)
        for file, text in sorted(_transcripts(data))
        if soundfile.info(file).duration <= LONGEST
    ]
    if len(found) < count:
        raise UserError(f"{data}: {len(found)} utterances with transcripts, {count} are needed")
    random.Random(seed).shuffle(found)
    read = ((soundfile.read(file, dtype="float32")[0], text) for file, text in found[:count])
    return [Utterance(torch.from_numpy(samples), text) for samples, text in read]


def _transcripts(data: Path) -> Iterator[tuple[str, str]]:
    """Audio files and their transcripts."""
    from espnet_kv.recipe.datadir import DataDir

    if (data / "wav.scp").is_file():
        kaldi = DataDir.read(data)
        for utterance, text in kaldi.text.items():
            yield kaldi.wav_scp[utterance], text
    for file in data.rglob("*.trans.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            if (audio := file.parent / f"{name}.flac").is_file():
                yield str(audio), text


def word_errors(hypotheses: Sequence[str], utterances: Sequence[Utterance]) -> dict[str, float]:
    """WER (%) after Whisper's normalisation, with its 95 % interval by bootstrap."""
    from whisper.normalizers import EnglishTextNormalizer

    from espnet_kv.recipe.score import score

    clean = EnglishTextNormalizer()
    references = {str(n): clean(text) for n, (_, text) in enumerate(utterances)}
    found = score(references, {str(n): clean(text) for n, text in enumerate(hypotheses)}, "wer")
    if found.interval is None:
        raise UserError("WERs need an interval: decode two or more utterances with words")
    low, high = found.interval
    return {"wer": round(found.error_rate, 2), "low": round(low, 2), "high": round(high, 2)}


class Conversions:
    """Converted modules of a model, by part, cut and method; each is made once.

    Args:
        model: the model. parts: those to convert. audio: samples to fit to. start: `start_tokens`.
    """

    def __init__(
        self, model: WhisperModel, parts: Sequence[str], audio: Sequence[Tensor], start: list[int]
    ):
        from espnet_kv.convert.calibration import HELD_OUT, CalibrationRunner
        from espnet_kv.convert.calls import recording
        from espnet_kv.convert.modules import plain_attention
        from espnet_kv.convert.source import PARTS as SLOTS
        from espnet_kv.convert.statistics import LayerStatistics

        self.model, self.slots = model, SLOTS
        self.held_out = audio[HELD_OUT - 1 :: HELD_OUT]
        fit = [x for n, x in enumerate(audio) if (n + 1) % HELD_OUT]
        self.runner = CalibrationRunner(model, decoding=True, start=start)
        self.runner.transcribe(audio, lambda: None)
        attentions = {part: SLOTS[part].attentions(model) for part in parts}
        modules = {name: a for named in attentions.values() for name, a in named.items()}
        sides = sorted({SLOTS[part].module for part in parts})
        with recording(modules) as seen:
            self.runner.backward(fit, modules=sides)
        self.layers: dict[str, dict[str, tuple[Any, Any]]] = {}
        for part, named in attentions.items():
            self.layers[part] = {}
            for name, attention in named.items():
                plain = plain_attention(attention)
                self.layers[part][name] = plain, LayerStatistics.of(plain, seen.pop(name))
        self.made: dict[tuple, dict[str, Any]] = {}

    def of(self, part: str, cut: float, method: str) -> dict[str, Any]:
        """Name -> module."""
        from espnet_kv.convert.choice import ModelError, choose_mla
        from espnet_kv.convert.factorize import to_mla, to_mla_by_second_moment
        from espnet_kv.convert.target import Target

        if (key := (part, cut, method)) in self.made:
            return self.made[key]
        layers, slot = self.layers[part], self.slots[part]
        target = Target("mla", target_compression=cut)
        attentions = {name: attention for name, (attention, _) in layers.items()}
        budget = target.budget(attentions)
        assert budget is not None
        rank = budget // len(layers)
        if method == METHODS[2]:
            side = slot.module

            def run() -> Tensor:
                return self.runner.run(self.held_out, modules=[side])[side]

            error = ModelError(self.model, slot, run)
            shared = target.shared_rank(slot, attentions)
            choice = choose_mla(layers, rank, budget, error.of, shared_rank=shared)
            print(f"{part}, {cut:g}: {choice.chosen}; {choice.errors}", file=sys.stderr, flush=True)
            self.made[key] = choice.modules
        elif method == METHODS[1]:
            self.made[key] = {
                name: to_mla_by_second_moment(attention, rank, known)
                for name, (attention, known) in layers.items()
            }
        else:
            self.made[key] = {name: to_mla(a, rank) for name, (a, _) in layers.items()}
        return self.made[key]


@torch.no_grad()
def decode(
    model: WhisperModel, encoded: Sequence[Tensor], start: list[int], cache_dtype: str
) -> list[str]:
    """Greedy transcripts of encoder outputs, each (T, D), BATCH utterances at a time."""
    from whisper.tokenizer import get_tokenizer

    from espnet_kv.convert.calibration import greedy_tokens

    tokenizer = get_tokenizer(model.token_type == "whisper_multilingual", language="en")
    model.decoder.cache_dtype = cache_dtype
    texts = []
    for first in range(0, len(encoded), BATCH):
        xs = torch.stack(list(encoded[first : first + BATCH]))
        for tokens in greedy_tokens(model, xs, start):
            text = tokens[len(start) :].tolist()
            texts.append(tokenizer.decode([token for token in text if token < model.eos]))
    return texts


@torch.no_grad()
def encode(model: WhisperModel, utterances: Sequence[tuple[Tensor, Any]]) -> list[Tensor]:
    """Encoder outputs (T, D) of samples, which come first in each utterance."""
    device = next(model.parameters()).device
    return [
        model.encode(x[None].to(device), torch.tensor([len(x)], device=device))[0][0]
        for x, _ in utterances
    ]


@command
def main(argv: list[str] | None = None) -> None:
    from espnet_kv.convert.calibration import start_tokens
    from espnet_kv.convert.choice import replaced
    from espnet_kv.convert.source import PARTS as SLOTS

    args = get_parser().parse_args(argv)
    print_software()
    model = WhisperModel(args.weights)
    start = start_tokens(model, {"token_type": model.token_type})
    read = read_utterances(args.data, args.utterances + args.calibration, args.seed)
    tested = read[: args.utterances]
    calibration = [x for x, _ in read[args.utterances :]]
    encodings = {None: encode(model, tested)}
    rows = []

    def measure(
        part: str, cut: float, method: str, converted: Mapping[str, dict[str, Any]]
    ) -> None:
        with ExitStack() as stack:
            for name, modules in converted.items():
                stack.enter_context(replaced(model, SLOTS[name], modules))
            of = (cut, method) if "encoder" in converted else None
            if of not in encodings:  # once for `encoder` and `all`
                encodings[of] = encode(model, tested)
            xs = encodings[of]
            for cache_dtype in args.cache_dtypes:
                found = word_errors(decode(model, xs, start, cache_dtype), tested)
                row = {"part": part, "cut": cut, "method": method, "cache_dtype": cache_dtype}
                rows.append(row | found)
                shown = f"{found['wer']} ({found['low']} to {found['high']})"
                print(f"| {' | '.join(map(str, row.values()))} | {shown} |", flush=True)

    print("\n| part | cut | method | cache | WER (%), 95 % interval |\n|---|---:|---|---|---|")
    measure("-", 0, "as released", {})
    together = {part: TOGETHER.get(part, (part,)) for part in args.parts}
    needed = [part for part in PARTS if any(part in names for names in together.values())]
    conversions = Conversions(model, needed, calibration, start)
    for cut in args.cuts:
        for part in args.parts:
            for method in args.methods:
                converted = {p: conversions.of(p, cut, method) for p in together[part]}
                measure(part, cut, method, converted)
    facts = {"benchmark": "whisper_conversion", "settings": settings(args), "results": rows}
    print(json.dumps(facts, default=str))


if __name__ == "__main__":
    sys.exit(main())
