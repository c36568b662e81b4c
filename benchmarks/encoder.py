"""Speed of each attention in ESPnet's encoder compared with the stock encoder.

A round runs every model once, in rotated order. The tables show the median over rounds of the time
ratios within a round, so that other load on the machine affects both sides of a ratio.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from common import (
    DROPOUTS,
    MELS,
    add_machine_options,
    by_side,
    copy_weights,
    encoder_conf,
    positive,
    print_device,
    print_software,
    ratio,
    rounds,
    set_up_machine,
    settings,
    timed,
)

from espnet_kv.cli import command

ATTENTIONS = ("mha", "gqa", "mla", "linear")
STOCK, STOCK_SDPA = "stock", "stock sdpa"
FRAMES_PER_SECOND = 100

# model -> (model to compare with, highest allowed ratio of times)
ENCODER_BARS = {"mha": (STOCK_SDPA, 1.05), "gqa": ("mha", 1.0), "mla": (STOCK_SDPA, 1.15)}
ATTENTION_BARS = {"linear": ("mha", 0.8)}


@dataclass(frozen=True)
class Case:
    """A measurement of whole encoders, or of one attention module of each."""

    title: str
    batch: int
    seconds: int
    training: bool
    attention_only: bool = False


CASES = {
    "infer-12s": Case("inference, 4 x 12 s", 4, 12, False),
    "infer-60s": Case("inference, 1 x 60 s", 1, 60, False),
    "train-12s": Case("training step, 4 x 12 s", 4, 12, True),
    "train-60s": Case("training step, 1 x 60 s", 1, 60, True),
    "attention-infer-60s": Case("one attention module, inference, 1 x 60 s", 1, 60, False, True),
    "attention-train-60s": Case("one attention module, training step, 1 x 60 s", 1, 60, True, True),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time every attention against ESPnet's stock encoder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--encoder", choices=("conformer", "branchformer"), default="conformer")
    add("--blocks", type=positive, default=12, help="encoder blocks")
    add("--repeats", type=positive, default=15, help="rounds of a case at most")
    add("--case_seconds", type=positive, default=45, help="begin no third round after")
    add_machine_options(parser)
    add("--chunk_size", type=int, default=0, help="of our encoders; 0: whole utterance, as stock")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="of these")
    return parser


def build_encoders(args: argparse.Namespace) -> dict:
    """Stock and our encoders of conf/, by name, with equal weights where names and shapes agree.

    Dropout is off, so that a training step does the same work in each. Causal convolution and
    dynamic chunks are off, because the stock encoder has neither.
    """
    import torch
    from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
    from espnet2.asr.encoder.conformer_encoder import ConformerEncoder

    from espnet_kv.encoder.encoders import KVBranchformerEncoder, KVConformerEncoder

    classes: dict[str, tuple[Any, Any]] = {
        "conformer": (ConformerEncoder, KVConformerEncoder),
        "branchformer": (BranchformerEncoder, KVBranchformerEncoder),
    }
    stock_class, our_class = classes[args.encoder]
    shared = {"num_blocks": args.blocks} | dict.fromkeys(DROPOUTS, 0.0)
    ours = {"causal": False, "dynamic_chunk_training": False, "chunk_size": args.chunk_size}

    def conf(attention: str) -> dict:
        return encoder_conf(args.encoder, attention) | shared

    torch.manual_seed(0)
    only_ours = ours.keys() | {"attention_type"}
    stock_conf = {key: value for key, value in conf("mha").items() if key not in only_ours}
    encoders = {
        STOCK: stock_class(MELS, **stock_conf, use_sdpa=False),
        STOCK_SDPA: stock_class(MELS, **stock_conf, use_sdpa=True),
    }
    for attention in ATTENTIONS:
        encoders[attention] = our_class(MELS, **conf(attention) | ours)
    weights = encoders[STOCK].state_dict()
    for encoder in encoders.values():
        copy_weights(weights, encoder)
        encoder.to(args.device)
    return encoders


def attention_module(encoder):
    """The attention module of the first block."""
    block = encoder.encoders[0]
    return block.attn if hasattr(block, "attn") else block.self_attn


def attention_macs(attention, frames: int, linear: bool) -> tuple[int, int]:
    """Multiply-accumulates of one attention module, (projections, mixing of frames).

    They follow the formulas, in the same way for every module: 2T-1 projected positions, T (2T-1)
    position scores, T T content scores and T T weighted values per model dimension.
    """
    from torch import nn

    positions = 2 * frames - 1
    projections = sum(
        module.weight.numel() * (positions if name == "linear_pos" else frames)
        for name, module in attention.named_modules()
        if isinstance(module, nn.Linear)
    )
    size = attention.h * attention.d_k
    mixing = 2 * frames * attention.d_k if linear else frames * (2 * frames + positions)
    return projections, size * mixing


def print_card(args: argparse.Namespace, encoders: dict) -> None:
    """The card: settings of the measurement."""
    chunks = f"chunks of {args.chunk_size} frames (stock: none)" if args.chunk_size else "no chunks"
    print(f"encoder   {args.encoder}, {args.blocks} blocks x {encoders['mha'].output_size()}")
    print_software()
    print_device(args.device)
    print(f"input     noise as {MELS} mel features of 10 ms, no padding, no dropout")
    print(f"stock     ESPnet's encoder, use_sdpa false; {STOCK_SDPA}: use_sdpa true")
    print(f"ours      conf/, convolutions not causal, {chunks}, weights of stock where they fit")
    if not args.chunk_size:
        print(f"check     mha - {STOCK_SDPA}: at most {output_difference(args, encoders):.1e}")

    print("\nAttention of all blocks, 10^9 multiply-accumulates: projections + mixing of frames\n")
    frames = {s: subsampled(s) for s in sorted({CASES[case].seconds for case in args.cases})}
    print("| model | parameters |", *(f"{s} s (T = {t}) |" for s, t in frames.items()))
    print("|---|---|" + "---|" * len(frames))
    for name, encoder in encoders.items():
        parameters = sum(p.numel() for p in encoder.parameters())
        cells = []
        for length in frames.values():
            macs = attention_macs(attention_module(encoder), length, linear=name == "linear")
            cells.append(" + ".join(f"{args.blocks * part / 1e9:.2f}" for part in macs))
        print(f"| {name} | {parameters / 1e6:.2f} M |", *(f"{cell} |" for cell in cells))
    print(flush=True)


def subsampled(seconds: int) -> int:
    """Frames after conv2d's two 3x3 convolutions of stride 2."""
    return ((seconds * FRAMES_PER_SECOND - 1) // 2 - 1) // 2


def features(case: Case, device: str) -> tuple:
    """(B, L, 80) noise and its lengths (B,)."""
    import torch

    frames = case.seconds * FRAMES_PER_SECOND
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(case.batch, frames, MELS, generator=generator)
    return xs.to(device), torch.full((case.batch,), frames, device=device)


def output_difference(args: argparse.Namespace, encoders: dict) -> float:
    """Largest difference between the outputs of mha and stock, which should be equal."""
    import torch

    xs, lengths = features(Case("", batch=2, seconds=4, training=False), args.device)
    with torch.no_grad():
        mha, stock = (encoders[name].eval()(xs, lengths)[0] for name in ("mha", STOCK_SDPA))
    return float((mha - stock).abs().max())


def workload(encoder, case: Case, device: str) -> Callable[[], None]:
    """One run of `case`: a forward pass, or forward, backward and freeing the gradients."""
    import torch

    encoder.train(case.training)
    xs, lengths = features(case, device)
    if case.attention_only:
        mask = torch.ones(case.batch, 1, xs.size(1), dtype=torch.bool, device=device)
        with torch.no_grad():
            (hidden, position), mask = encoder.embed(xs, mask)
        hidden.requires_grad_(case.training)
        module = attention_module(encoder)

        def forward():
            return module(hidden, hidden, hidden, position, mask)
    else:

        def forward():
            return encoder(xs, lengths)[0]

    def infer() -> None:
        with torch.inference_mode():
            forward()

    def train() -> None:
        out = forward()
        out.backward(torch.ones_like(out))
        encoder.zero_grad(set_to_none=True)
        if case.attention_only:
            hidden.grad = None

    return train if case.training else infer


def measure(encoders: dict, case: Case, args: argparse.Namespace) -> dict[str, list]:
    """Seconds of every model in every round."""
    # warm-up: on a GPU kernels are selected by shape; a CPU needs only a second of audio
    warm_up = case if args.device == "cuda" else replace(case, seconds=1)
    for encoder in encoders.values():
        timed(args.device, workload(encoder, warm_up, args.device))
    runs = {model: workload(encoder, case, args.device) for model, encoder in encoders.items()}
    return by_side(list(rounds(runs, args.device, args.repeats, args.case_seconds)))


def tabulate(case: Case, seconds: dict[str, list]) -> dict[str, dict]:
    """Print the table of a case; return its numbers by model."""
    print(f"{case.title}, {len(seconds[STOCK])} rounds\n")
    print(f"| model | median ms | x {STOCK_SDPA} | x mha | bar |  |\n|---|---|---|---|---|---|")
    bars = ATTENTION_BARS if case.attention_only else ENCODER_BARS
    results = {}
    for model, times in seconds.items():
        ratios = {other: ratio(times, seconds[other]) for other in (STOCK_SDPA, "mha")}
        row = {"ms": round(1e3 * statistics.median(times), 1)} | {"ratios": ratios}
        bar, verdict = "", ""
        if model in bars:
            other, most = bars[model]
            row["met"] = ratios[other] <= most
            bar, verdict = f"{most} x {other}", "met" if row["met"] else "missed"
        numbers = (f"{value:.3f}" for value in ratios.values())
        print("|", " | ".join([model, f"{row['ms']:.1f}", *numbers, bar, verdict]), "|")
        results[model] = row
    print(flush=True)
    return results


@command
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    set_up_machine(parser, args)
    encoders = build_encoders(args)
    print_card(args, encoders)
    results = {}
    for name in args.cases:
        results[name] = tabulate(CASES[name], measure(encoders, CASES[name], args))
    print(json.dumps({"benchmark": "encoder", "settings": settings(args), "results": results}))


if __name__ == "__main__":
    sys.exit(main())
