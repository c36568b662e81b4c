"""Word error rates of a converted Whisper decoder after fine-tuning, beside a control.

Shape letters: B utterances, T encoder frames, D model size, L tokens, V vocabulary, N blocks of the
decoder, K tokens of a batch that are learnt.
"""

import argparse
import copy
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import positive, print_software, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from whisper_conversion import (
    BATCH,
    LONGEST,
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
from espnet_kv.convert.calibration import greedy_tokens, start_tokens
from espnet_kv.errors import UserError
from espnet_kv.files import new_file

PARTS = TOGETHER["decoder"]
LONGEST_TEXT = 150
"""Tokens; the released decoder writes more where it repeats itself."""
RATE, WINDOW = 16000, (4.0, LONGEST)
"""Hz, and the shortest and the longest window of joined utterances in seconds."""
TRAINED = {"decoder": "", "blocks": "blocks.", "attention": "attn"}
"""What is trained: part of the names of its parameters."""
# of ESPnet's recipe that fine-tunes Whisper
LABEL_SMOOTHING, CLIP = 0.1, 1.0
OPTIMIZER = {"weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
READ = ("weights", "train", "train_utterances")
CONVERTED = (*READ, "calibration", "cut")
WORDS = (*READ, "learn")
LEARNT = (*WORDS, "windows")
"""Options that decide what `--work` keeps."""


class Spoken(NamedTuple):
    """samples: (N,) at RATE, N at most 30 s. tokens: (L,) of what is said."""

    samples: Tensor
    tokens: Tensor


class Example(NamedTuple):
    """An utterance to learn.

    Attributes:
        encoded: (T, D) encoder output.
        tokens: (L,) of the transcript, or those that the released decoder writes.
        blocks: (N, L + start, D) outputs of the released decoder's blocks for the start and these
            tokens; None: the transcript is learnt.
    """

    encoded: Tensor
    tokens: Tensor
    blocks: Tensor | None


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
    add("--trained", choices=list(TRAINED), default="decoder", help="all of it, or a part")
    add(
        "--learn",
        choices=["transcripts", "released"],
        default="transcripts",
        help="the transcripts, or the words and outputs of the released decoder: its probabilities "
        "of each token and the outputs of its blocks",
    )
    add(
        "--windows",
        type=int,
        default=0,
        help="of each directory: utterances joined at random, up to 30 s; 0: each by itself",
    )
    add("--block_weight", type=float, default=0.5, help="of the outputs of blocks")
    add("--batch_size", type=positive, default=8, help="utterances")
    add("--lr", type=float, default=1e-5, help="learning rate after warm-up")
    add("--cache_dtypes", nargs="+", default=["fp32", "int8"], help="fp32, int8, int4")
    add("--device", default="cpu", help="cpu or cuda, for everything but the conversion")
    add("--work", type=Path, help="keep here what is learnt and conversions, for the next run")
    return parser


def kept(args: Any, name: str, options: Sequence[str], make: Callable, *operands) -> Any:
    """What `make` returns, or what an earlier run with the same `options` left in `--work`."""
    if args.work is None:
        return make(*operands)
    file = args.work / f"{name}.pt"
    made_with = {option: str(getattr(args, option)) for option in options}
    if file.is_file():
        found = torch.load(file, weights_only=False, mmap=True)
        if found["options"] == made_with:
            return found["made"]
    made = make(*operands)
    with new_file(file) as part:
        torch.save({"options": made_with, "made": made}, part)
    return made


def words_of(
    model: WhisperModel, utterances: Sequence[Utterance], start: list[int], learn: str
) -> list[Tensor]:
    """Tokens (L,) to learn of each utterance: of its normalised transcript, or the released
    decoder's, as the greedy search finds them."""
    if learn == "released":
        model.decoder.cache_dtype = "fp32"
        return [
            tokens[len(start) :].cpu()
            for batch in itertools.batched(utterances, BATCH)
            for tokens in greedy_tokens(model, torch.stack(encode(model, batch)), start)
        ]
    from whisper.normalizers import EnglishTextNormalizer
    from whisper.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(model.token_type == "whisper_multilingual", language="en")
    normalize = EnglishTextNormalizer()
    return [torch.tensor(tokenizer.encode(" " + normalize(text))) for _, text in utterances]


def joined(spoken: Sequence[Spoken], count: int, generator: random.Random) -> list[Spoken]:
    """`count` windows of utterances one after the other, of a random length up to LONGEST.

    Each utterance comes once before any comes again.
    """
    windows, order = [], list[Spoken]()
    while len(windows) < count:
        longest = generator.uniform(*WINDOW) * RATE
        window = list[Spoken]()
        while True:
            order = order or generator.sample(spoken, len(spoken))
            total = sum(len(samples) for samples, _ in [*window, order[-1]])
            if window and total > longest:
                break
            window.append(order.pop())
        windows.append(Spoken(*map(torch.cat, zip(*window, strict=True))))
    return windows


@torch.no_grad()
def examples(
    model: WhisperModel, spoken: Sequence[Spoken], start: list[int], learn: str
) -> list[Example]:
    """What is learnt: encoder outputs, which stay as they are, tokens, and outputs of blocks."""
    found = []
    for one in spoken:
        (encoded,) = encode(model, [one])
        example = Example(encoded, one.tokens, None)
        if learn == "released":
            with block_outputs(model.decoder) as blocks:
                scores_of(model, [example], start)
            example = example._replace(blocks=torch.cat(blocks))
        found.append(example)
    return found


@contextmanager
def block_outputs(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, outputs (B, L, D) of the decoder's blocks are added to the list."""
    outputs: list[Tensor] = []
    blocks = decoder.decoders.blocks
    hooks = [
        block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in blocks
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def scores_of(
    model: WhisperModel, batch: Sequence[Example], start: list[int]
) -> tuple[Tensor, Tensor]:
    """The decoder's logits of the tokens of a batch and of the ends behind them.

    Returns:
        (K, V) and the mask (B, L) of their places in the decoder's output.
    """
    device = batch[0].encoded.device
    inputs = [torch.cat([torch.tensor(start), example.tokens]) for example in batch]
    encoded = torch.stack([example.encoded for example in batch])  # (B, T, D)
    frames = torch.full([len(batch)], encoded.size(1), device=device)
    lengths = torch.tensor([len(tokens) for tokens in inputs], device=device)
    padded = pad_sequence(inputs, batch_first=True, padding_value=model.eos).to(device)  # (B, L)
    places = torch.arange(padded.size(1), device=device)
    learnt = (places >= len(start) - 1) & (places < lengths[:, None])
    return model.decoder(encoded, frames, padded, lengths)[0][learnt], learnt


def transcript_loss(model: WhisperModel, batch: Sequence[Example], start: list[int]) -> Tensor:
    """The cross-entropy of the transcripts, with smoothed labels."""
    scores, _ = scores_of(model, batch, start)
    end = torch.tensor([model.eos])
    wanted = torch.cat([token for example in batch for token in (example.tokens, end)])
    return cross_entropy(scores, wanted.to(scores.device), label_smoothing=LABEL_SMOOTHING)


def released_loss(
    model: WhisperModel,
    released: nn.Module,
    batch: Sequence[Example],
    start: list[int],
    block_weight: float,
) -> Tensor:
    """The divergence from the released decoder's probabilities, and the distance of its blocks.

    Args:
        block_weight: of the sum over blocks of the squared distance between their outputs, relative
            to the variance of the released decoder's.
    """
    with block_outputs(model.decoder) as blocks:
        scores, learnt = scores_of(model, batch, start)
    found = torch.stack([block[learnt] for block in blocks])  # (N, K, D)
    wanted = torch.cat([example.blocks[:, len(start) - 1 :] for example in batch], dim=1)
    with torch.no_grad():
        logits = released.decoders.ln(wanted[-1]) @ released.decoders.token_embedding.weight.T
        expected = log_softmax(logits, dim=-1)
    divergence = kl_div(
        log_softmax(scores, dim=-1), expected, reduction="batchmean", log_target=True
    )
    distance = (found - wanted).square().mean(dim=(1, 2)) / wanted.var(dim=(1, 2))
    return divergence + block_weight * distance.sum()


def fine_tune(
    model: WhisperModel,
    released: nn.Module,
    data: Sequence[Example],
    start: list[int],
    args: Any,
    seed: int,
) -> float:
    """Train the decoder in place; return the mean loss of the last quarter of the updates."""
    generator, part = torch.Generator().manual_seed(seed), TRAINED[args.trained]
    model.decoder.requires_grad_(False)
    trained = [weight for name, weight in model.decoder.named_parameters() if part in name]
    for weight in trained:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, **OPTIMIZER)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: min(1, (update + 1) / args.warmup) * (1 - update / args.updates),
    )
    model.decoder.train()
    order: list[int] = []
    losses = []
    for _ in range(args.updates):
        if len(order) < args.batch_size:
            order = torch.randperm(len(data), generator=generator).tolist()
        batch = [data[order.pop()] for _ in range(args.batch_size)]
        if args.learn == "released":
            loss = released_loss(model, released, batch, start, args.block_weight)
        else:
            loss = transcript_loss(model, batch, start)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    model.decoder.eval()
    last = losses[-(-3 * len(losses) // 4) :] or losses
    return sum(last) / len(last)


@command
def main(argv: list[str] | None = None) -> None:
    from espnet_kv.convert.choice import replaced
    from espnet_kv.convert.source import PARTS as SLOTS

    args = get_parser().parse_args(argv)
    print_software()
    model = WhisperModel(args.weights)
    start = start_tokens(model, {"token_type": model.token_type})
    device = torch.device(args.device)
    tested = {data: read_utterances(data, args.test_utterances, 0) for data in args.test}
    model.to(device)
    encodings = {data: encode(model, utterances) for data, utterances in tested.items()}
    read = [u for data in args.train for u in read_utterances(data, args.train_utterances, 0)]

    def learnt() -> list[Example]:
        words = kept(args, "words", WORDS, words_of, model, read, start, args.learn)
        spoken, generator = list[Spoken](), random.Random(0)
        for pairs in itertools.batched(zip(read, words, strict=True), args.train_utterances):
            own = [Spoken(x, tokens) for (x, _), tokens in pairs if len(tokens) <= LONGEST_TEXT]
            spoken += joined(own, args.windows, generator) if args.windows else own
        return examples(model, spoken, start, args.learn)

    training = kept(args, "learnt", LEARNT, learnt)
    if len(training) < args.batch_size:
        raise UserError(
            f"--batch_size {args.batch_size}: only {len(training)} windows are learnt; give a "
            "smaller one, or more --train_utterances or --windows"
        )
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

    def convert(seed: int) -> dict[str, dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(read), generator=generator)[: args.calibration].tolist()
        conversions = Conversions(model.cpu(), PARTS, [read[n].samples for n in drawn], start)
        return {part: conversions.of(part, args.cut, METHODS[2]) for part in PARTS}

    print(f"\n| model | seed | cache | loss | WER (%) of {' | '.join(map(str, args.test))} |")
    print(f"|---|---:|---|---:|{'---|' * len(args.test)}")
    measure("as released", "-")
    for seed in args.seeds:
        converted = kept(args, f"converted_{seed}", CONVERTED, convert, seed)
        released = model.to(device).decoder
        for name, modules in (("control", {}), ("converted", converted)):
            model.decoder = copy.deepcopy(released)
            with ExitStack() as stack:
                for part, layers in modules.items():
                    stack.enter_context(replaced(model, SLOTS[part], copy.deepcopy(layers)))
                model.to(device)
                if modules:
                    measure(name, seed)
                elif args.learn == "released":
                    continue  # it is what is learnt
                loss = fine_tune(model, released, training, start, args, seed)
                measure(f"{name}, fine-tuned", seed, loss)
        model.decoder = released
    facts = {"benchmark": "whisper_finetuning", "settings": settings(args), "results": rows}
    print(json.dumps(facts, default=str))


if __name__ == "__main__":
    sys.exit(main())
