"""Word error rates of a converted Whisper decoder after fine-tuning, beside a control.

Shape letters: B utterances, T encoder frames, D model size, L tokens, V vocabulary.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import positive, print_software, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from whisper_conversion import (
    METHODS,
    TOGETHER,
    Conversions,
    Utterance,
    WhisperModel,
    decode,
    encode,
    read_utterances,
    word_errors,
)

from espnet_kv.cli import command

PARTS = TOGETHER["decoder"]
IGNORED = -1
TRAINED = {"decoder": "", "attention": "attn"}
"""What is trained: part of the names of its parameters."""
# of ESPnet's recipe that fine-tunes Whisper
LABEL_SMOOTHING, CLIP = 0.1, 1.0
OPTIMIZER = {"weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}


class Example(NamedTuple):
    """encoded: (T, D) encoder output. tokens: (L,) of the transcript."""

    encoded: Tensor
    tokens: Tensor


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert self- and cross-attention of a Whisper model to mla, fine-tune its "
        "decoder and that of the model as it was (control) in the same way, and decode greedily.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("weights", help="model.bin, FILE.pt, or a name with the files in the cache of Whisper")
    add("--train", type=Path, nargs="+", required=True, help="LibriSpeech or Kaldi directories")
    add("--test", type=Path, nargs="+", required=True, help="the same, of other speakers")
    add("--train_utterances", type=positive, default=400, help="of each directory")
    add("--test_utterances", type=positive, default=100, help="of each directory")
    add("--calibration", type=positive, default=64, help="of all of those; every fifth held out")
    add("--cut", type=float, default=0.875, help="share of the cache that goes")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration and training")
    add("--updates", type=positive, default=200, help="of the optimizer")
    add("--warmup", type=positive, default=30, help="updates; then lr falls to 0 in a line")
    add("--trained", choices=list(TRAINED), default="decoder", help="all of it, or its attention")
    add("--distill", type=fraction, default=0.0, help="weight of the released decoder's outputs")
    add("--batch_size", type=positive, default=8, help="utterances")
    add("--lr", type=float, default=1e-5, help="learning rate after warm-up")
    add("--cache_dtypes", nargs="+", default=["fp32", "int8"], help="fp32, int8, int4")
    add("--device", default="cpu", help="cpu or cuda, for everything but the conversion")
    return parser


def examples(
    model: WhisperModel, utterances: Sequence[Utterance], tokenizer: Any, normalize: Any
) -> list[Example]:
    """Encoder outputs, which stay as they are, and tokens of normalised transcripts."""
    return [
        Example(encoded, torch.tensor(tokenizer.encode(" " + normalize(text))))
        for encoded, (_, text) in zip(encode(model, utterances), utterances, strict=True)
    ]


def fraction(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: between 0 and 1")
    return value


def fine_tune(
    model: WhisperModel,
    teacher: nn.Module,
    data: Sequence[Example],
    start: list[int],
    args: Any,
    seed: int,
) -> float:
    """Train the decoder in place; return the mean loss of the last quarter of the updates.

    The loss is (1 - d) times the cross-entropy of transcripts, with smoothed labels, and d times
    the divergence from the output of `teacher`, where d is --distill.
    """
    generator, part = torch.Generator().manual_seed(seed), TRAINED[args.trained]
    trained = [p for name, p in model.decoder.named_parameters() if part in name]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, **OPTIMIZER)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: min(1, (update + 1) / args.warmup) * (1 - update / args.updates),
    )
    order: list[int] = []
    losses = []
    for _ in range(args.updates):
        if len(order) < args.batch_size:
            order = torch.randperm(len(data), generator=generator).tolist()
        batch = [data[order.pop()] for _ in range(args.batch_size)]
        loss = _loss(model, teacher, batch, start, args.distill)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    model.decoder.eval()
    last = losses[-(-3 * len(losses) // 4) :] or losses
    return sum(last) / len(last)


def _loss(
    model: WhisperModel,
    teacher: nn.Module,
    batch: Sequence[Example],
    start: list[int],
    distill: float,
) -> Tensor:
    """The loss of the tokens after `start`."""
    model.decoder.train()
    device = batch[0].encoded.device
    first = torch.tensor(start)
    inputs = [torch.cat([first, tokens]) for _, tokens in batch]
    targets = [torch.cat([tokens, torch.tensor([model.eos])]) for _, tokens in batch]
    encoded = torch.stack([encoded for encoded, _ in batch])  # (B, T, D)
    frames = torch.full([len(batch)], encoded.size(1), device=device)
    lengths = torch.tensor([len(tokens) for tokens in inputs], device=device)
    padded = pad_sequence(inputs, batch_first=True, padding_value=model.eos).to(device)  # (B, L)
    wanted = pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(device)
    kept = wanted != IGNORED

    def scores(decoder: nn.Module) -> Tensor:
        """(N, V) of the N tokens of the batch."""
        return decoder(encoded, frames, padded, lengths)[0][:, len(start) - 1 :][kept]

    found = scores(model.decoder)
    loss = found.new_zeros(())
    if distill < 1:
        smoothed = cross_entropy(found, wanted[kept], label_smoothing=LABEL_SMOOTHING)
        loss = loss + (1 - distill) * smoothed
    if distill > 0:
        with torch.no_grad():
            expected = log_softmax(scores(teacher), dim=-1)
        found = log_softmax(found, dim=-1)
        divergence = kl_div(found, expected, reduction="batchmean", log_target=True)
        loss = loss + distill * divergence
    return loss


@command
def main(argv: list[str] | None = None) -> None:
    from whisper.normalizers import EnglishTextNormalizer
    from whisper.tokenizer import get_tokenizer

    from espnet_kv.convert.calibration import start_tokens
    from espnet_kv.convert.choice import replaced
    from espnet_kv.convert.source import PARTS as SLOTS

    args = get_parser().parse_args(argv)
    print_software()
    model = WhisperModel(args.weights)
    start = start_tokens(model, {"token_type": model.token_type})
    tokenizer = get_tokenizer(model.token_type == "whisper_multilingual", language="en")
    device = torch.device(args.device)
    tested = {data: read_utterances(data, args.test_utterances, 0) for data in args.test}
    model.to(device)
    encodings = {data: encode(model, utterances) for data, utterances in tested.items()}
    read = [u for data in args.train for u in read_utterances(data, args.train_utterances, 0)]
    training = examples(model, read, tokenizer, EnglishTextNormalizer())
    rows = []

    def measure(name: str, seed: int | str, loss: float | None = None) -> None:
        for cache_dtype in args.cache_dtypes:
            found = {
                data: word_errors(decode(model, encodings[data], start, cache_dtype), utterances)
                for data, utterances in tested.items()
            }
            row = {"model": name, "seed": seed, "cache_dtype": cache_dtype}
            wers = {str(data): wer for data, wer in found.items()}
            rows.append(row | {"loss": loss, "wer": wers})
            shown = [f"{w['wer']} ({w['low']} to {w['high']})" for w in found.values()]
            last = "" if loss is None else f"{loss:.3f}"
            print(f"| {' | '.join(map(str, row.values()))} | {last} | {' | '.join(shown)} |")
            sys.stdout.flush()

    print(f"\n| model | seed | cache | loss | WER (%) of {' | '.join(map(str, args.test))} |")
    print(f"|---|---:|---|---:|{'---|' * len(args.test)}")
    measure("as released", "-")
    for seed in args.seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(read), generator=generator)[: args.calibration].tolist()
        model.cpu()
        conversions = Conversions(model, PARTS, [read[n].samples for n in drawn], start)
        converted = {part: conversions.of(part, args.cut, METHODS[2]) for part in PARTS}
        released = model.to(device).decoder
        for name, modules in (("control", {}), ("converted", converted)):
            model.decoder = copy.deepcopy(released)
            with ExitStack() as stack:
                for part, layers in modules.items():
                    stack.enter_context(replaced(model, SLOTS[part], copy.deepcopy(layers)))
                model.to(device)
                if modules:
                    measure(name, seed)
                elif args.distill == 1:
                    continue  # it would learn from its own outputs: it is the released decoder
                loss = fine_tune(model, released, training, start, args, seed)
                measure(f"{name}, fine-tuned", seed, loss)
        model.decoder = released
    facts = {"benchmark": "whisper_finetuning", "settings": settings(args), "results": rows}
    print(json.dumps(facts, default=str))


if __name__ == "__main__":
    sys.exit(main())
