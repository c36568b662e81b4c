"""How fast each attention is inside ESPnet's encoder, against the stock encoder.

Every round runs each model once, in rotated order, and the table gives the median over rounds of
the time ratios within a round: whatever else the machine does falls on both sides of a ratio.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"
ATTENTIONS = ("mha", "gqa", "mla", "linear")
STOCK, STOCK_SDPA = "stock", "stock sdpa"
MELS = 80
FRAMES_PER_SECOND = 100

# Where a run reads in the table: (model, what it is compared with) -> at most this ratio.
ENCODER_BARS = {("mha", STOCK_SDPA): 1.05, ("gqa", "mha"): 1.0, ("mla", STOCK_SDPA): 1.15}
ATTENTION_BARS = {("linear", "mha"): 0.8}


@dataclass(frozen=True)
class Case:
    """What is timed: whole encoders, or all their attention modules and nothing else."""

    title: str
    batch: int
    seconds: int
    training: bool
    attention_only: bool = False

    @property
    def bars(self) -> dict[tuple[str, str], float]:
        return ATTENTION_BARS if self.attention_only else ENCODER_BARS


CASES = {
    "infer-12s": Case("inference, 4 x 12 s", 4, 12, False),
    "infer-60s": Case("inference, 1 x 60 s", 1, 60, False),
    "train-12s": Case("training step, 4 x 12 s", 4, 12, True),
    "train-60s": Case("training step, 1 x 60 s", 1, 60, True),
    "attention-infer-60s": Case("attention modules alone, inference, 1 x 60 s", 1, 60, False, True),
    "attention-train-60s": Case(
        "attention modules alone, training step, 1 x 60 s", 1, 60, True, True
    ),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time every attention against ESPnet's stock encoder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--encoder", choices=("conformer", "branchformer"), default="conformer")
    parser.add_argument("--blocks", type=_positive, default=12, help="encoder blocks")
    parser.add_argument("--repeats", type=_positive, default=5, help="rounds after the warm-up")
    parser.add_argument("--threads", type=_positive, help="torch threads (unset: torch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--chunk_size",
        type=_whole,
        default=0,
        help="chunks of our encoders, in frames of 40 ms (0: the whole utterance, as stock sees)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        help="what to time",
        metavar="CASE",
    )
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if not _whole(text):
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def build_encoders(args: argparse.Namespace) -> dict:
    """Stock and our encoders of conf/, by name, with the same weights wherever names agree.

    Dropout is off, so that a training step does the same work in each; causal convolution and
    dynamic chunks are off, because the stock encoder has neither.
    """
    import torch
    from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
    from espnet2.asr.encoder.conformer_encoder import ConformerEncoder

    from espnet_kv.encoder.branchformer import KVBranchformerEncoder
    from espnet_kv.encoder.conformer import KVConformerEncoder
    from espnet_kv.recipe.config import load_yaml

    stock_class, our_class = {
        "conformer": (ConformerEncoder, KVConformerEncoder),
        "branchformer": (BranchformerEncoder, KVBranchformerEncoder),
    }[args.encoder]
    shared = {
        "num_blocks": args.blocks,
        "dropout_rate": 0.0,
        "positional_dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
    }
    ours = {"causal": False, "dynamic_chunk_training": False, "chunk_size": args.chunk_size}

    def conf_of(attention: str) -> dict:
        path = CONF / f"train_asr_{args.encoder}_{attention}.yaml"
        return load_yaml(path)["encoder_conf"] | shared

    stock_conf = {
        key: value
        for key, value in conf_of("mha").items()
        if key not in ours and not key.startswith("attention_type")
    }
    torch.manual_seed(0)
    stock = stock_class(MELS, **stock_conf, use_sdpa=False)
    encoders = {STOCK: stock, STOCK_SDPA: stock_class(MELS, **stock_conf, use_sdpa=True)}
    for attention in ATTENTIONS:
        encoders[attention] = our_class(MELS, **conf_of(attention) | ours)
    weights = stock.state_dict()
    for encoder in encoders.values():
        for name, parameter in encoder.state_dict().items():
            if name in weights and weights[name].shape == parameter.shape:
                parameter.copy_(weights[name])
        encoder.to(args.device)
    return encoders


def attention_modules(encoder) -> list:
    # the branchformer's slot is attn, the conformer's self_attn
    return [getattr(b, "attn", None) or b.self_attn for b in encoder.encoders]


def attention_macs(attention, frames: int, linear: bool) -> tuple[int, int]:
    """Multiply-accumulates of one attention module, (projections, mixing of frames).

    What the formulas ask for, counted alike for every module: 2T-1 projected positions, T (2T-1)
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
    """What is about to be timed, before a clock is started."""
    import torch

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {_cpu_name()}"
    versions = f"espnet {importlib.metadata.version('espnet')}, torch {torch.__version__}"
    print(f"encoder     {args.encoder}, {args.blocks} blocks x {encoders['mha'].output_size()}")
    print(f"software    {versions}, Python {sys.version.split()[0]}")
    print(f"device      {device}, {torch.get_num_threads()} threads, float32")
    print(f"input       {MELS} mel features of 10 ms, no padding, every dropout 0")
    print(f"stock       ESPnet's encoder as its defaults have it; {STOCK_SDPA!r}: use_sdpa true")
    print(
        "ours        kv encoders of conf/, convolutions not causal, weights of stock, "
        + (f"chunks of {args.chunk_size} frames (stock: none)" if args.chunk_size else "no chunks")
    )
    print(f"measured    {args.repeats} rounds; ratios are medians of the ratios within a round")
    if not args.chunk_size:
        print(
            f"check       mha differs from {STOCK_SDPA} by {output_difference(args, encoders):.1e}"
        )
    cases = {CASES[name].seconds for name in args.cases}
    frames = {s: subsampled_frames(s) for s in sorted(cases)}
    print("\nGMAC = 10^9 multiply-accumulates of all attention modules: projections + mixing\n")
    print(
        "| model | parameters | " + " | ".join(f"{s} s: T = {t}" for s, t in frames.items()) + " |"
    )
    print("|---|---|" + "---|" * len(frames))
    for name, encoder in encoders.items():
        parameters = sum(p.numel() for p in encoder.parameters())
        cells = []
        for length in frames.values():
            parts = [
                attention_macs(m, length, name == "linear") for m in attention_modules(encoder)
            ]
            cells.append(" + ".join(f"{sum(part) / 1e9:.2f}" for part in zip(*parts, strict=True)))
        print(f"| {name} | {parameters / 1e6:.2f} M | {' | '.join(cells)} |")
    print(flush=True)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def subsampled_frames(seconds: int) -> int:
    """Frames after conv2d's two 3x3 convolutions of stride 2."""
    return ((seconds * FRAMES_PER_SECOND - 1) // 2 - 1) // 2


def features(case: Case, device: str) -> tuple:
    """(B, L, 80) noise and its lengths (B,)."""
    import torch

    generator = torch.Generator().manual_seed(case.seconds)
    frames = case.seconds * FRAMES_PER_SECOND
    xs = torch.randn(case.batch, frames, MELS, generator=generator)
    return xs.to(device), torch.full((case.batch,), frames, device=device)


def output_difference(args: argparse.Namespace, encoders: dict) -> float:
    """Largest difference between the mha and the stock encoder's output: like against like."""
    import torch

    xs, lengths = features(Case("", 2, 4, False), args.device)
    with torch.no_grad():
        mha, stock = (encoders[name].eval()(xs, lengths)[0] for name in ("mha", STOCK_SDPA))
    return float((mha - stock).abs().max())


def workload(encoder, case: Case, device: str) -> Callable[[], None]:
    """One run of `case`: a forward pass, or forward, backward and dropping the gradients."""
    import torch

    encoder.train(case.training)
    xs, lengths = features(case, device)
    if case.attention_only:
        mask = torch.ones(case.batch, 1, xs.size(1), dtype=torch.bool, device=device)
        with torch.no_grad():
            (hidden, pos_emb), mask = encoder.embed(xs, mask)
        modules = attention_modules(encoder)
        hidden.requires_grad_(case.training)

        def forward():
            # each module on the same input, as deep stacks without residuals fade to nothing
            return sum(m(hidden, hidden, hidden, pos_emb, mask) for m in modules)
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

    return train if case.training else infer


def measure(runs: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list]:
    """Seconds of every run in every round; each round begins one model later than the last."""
    import torch

    def timed(run: Callable[[], None]) -> float:
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    names = list(runs)
    for name in names:  # the first run allocates and picks kernels
        timed(runs[name])
    seconds: dict[str, list] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(runs[name]))
    return seconds


def ratio(seconds: dict[str, list], model: str, other: str) -> float:
    pairs = zip(seconds[model], seconds[other], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def tabulate(case: Case, seconds: dict[str, list]) -> dict[str, dict]:
    """Print a case's table. Returns its numbers by model."""
    print(f"### {case.title}\n")
    print(f"| model | median ms | x {STOCK_SDPA} | x mha | bar |  |")
    print("|---|---|---|---|---|---|")
    results = {}
    for model, times in seconds.items():
        row = {
            "ms": round(1e3 * statistics.median(times), 1),
            "vs_stock_sdpa": ratio(seconds, model, STOCK_SDPA),
            "vs_mha": ratio(seconds, model, "mha"),
        }
        verdict = ["", ""]
        for (name, other), bar in case.bars.items():
            if name == model:
                met = row["vs_mha" if other == "mha" else "vs_stock_sdpa"] <= bar
                row |= {"bar": bar, "bar_against": other, "met": met}
                verdict = [f"{bar} x {other}", "met" if met else "missed"]
        numbers = [f"{row['ms']:.1f}", f"{row['vs_stock_sdpa']:.3f}", f"{row['vs_mha']:.3f}"]
        print(f"| {' | '.join([model, *numbers, *verdict])} |")
        results[model] = row
    print(flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    encoders = build_encoders(args)
    print_card(args, encoders)
    results = {}
    for name in args.cases:
        case = CASES[name]
        runs = {model: workload(encoders[model], case, args.device) for model in encoders}
        results[name] = tabulate(case, measure(runs, args.repeats, args.device))
    settings = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    settings["espnet"] = importlib.metadata.version("espnet")
    print(json.dumps({"benchmark": "encoder", "settings": settings, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
