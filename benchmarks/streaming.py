"""Time and memory of a streaming chunk compared with ESPnet's asr_transducer encoder.

All sides run in every round, and a ratio is the median over rounds of the ratios within a round, so
that other load on the machine affects both sides.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from common import (
    MELS,
    add_machine_options,
    by_side,
    positive,
    print_device,
    print_software,
    ratio,
    rounds,
    set_up_machine,
    settings,
)
from sides import (
    ATTENTIONS,
    CHUNK,
    ESPNET,
    NEW,
    TRIMMED,
    Espnet,
    Ours,
    Stream,
    TrimmedEspnet,
    build_espnet,
    build_ours,
    conf_of,
    multiply_accumulates,
)
from torch import Tensor

from espnet_kv.cache import EncoderState
from espnet_kv.cli import command

FRAMES_PER_MINUTE = 1500
STREAMS = 16
MANY = 64  # streams in the case moves-64
MLA_BAR = ("mla", "mha", 1.0)  # highest ratio of the first time to the second
LEAST_GAIN = 1.8  # lowest ratio of the throughput of a batch to that of single streams
MOST_MOVING = 0.1  # highest ratio of the time of one change to that of copying all streams
MOST_AGEING = 1.05  # highest ratio of the time of a chunk in the last minute to minute 2


@dataclass(frozen=True)
class Case:
    """A measurement with a number of chunks of left context.

    most: highest ratio of mha's time to ESPnet's, for cases with ESPnet.
    """

    left_chunks: int
    run: Callable[[dict, "Case", argparse.Namespace], dict]
    most: float = 0.0

    @property
    def left(self) -> int:
        """Left context in frames."""
        return self.left_chunks * CHUNK


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time a chunk of streaming with every attention, beside ESPnet's own encoder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--blocks", type=positive, default=12, help="encoder blocks")
    add("--rounds", type=positive, default=40, help="rounds of a case")
    add(
        "--chunks", type=positive, default=4, help="consecutive chunks per side and round (chunk-*)"
    )
    add("--hour", type=positive, default=60, metavar="MINUTES", help="audio of the case hour")
    add_machine_options(parser)
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="of these")
    return parser


def noise(device: str, chunks: int, streams: int = 1) -> Tensor:
    """Features (B, 4 C n + 11, F) of n chunks, always the same."""
    frames = NEW * (chunks - 1) + Espnet.window
    generator = torch.Generator().manual_seed(0)
    return torch.randn(streams, frames, MELS, generator=generator).to(device)


def open_streams(encoders: dict, left_chunks: int, features: Tensor) -> dict[str, Stream]:
    """A stream through every encoder, by name."""
    sides = {ESPNET: Espnet, TRIMMED: TrimmedEspnet}
    return {
        name: sides.get(name, Ours)(encoder, left_chunks, features)
        for name, encoder in encoders.items()
    }


def print_card(encoders: dict, args: argparse.Namespace) -> None:
    """The card: settings of the measurement."""
    lefts = sorted({CASES[case].left_chunks for case in args.cases})
    size = encoders["mha"].output_size()
    print(f"encoder   conformer of conf/, {args.blocks} blocks x {size}, causal, no dropout")
    print_software()
    print_device(args.device)
    print(f"input     noise as {MELS} mel features of 10 ms; {NEW} new ones give {CHUNK} frames")
    overlap, extra = Espnet.window - NEW, f"{TrimmedEspnet.window} features, nothing dropped"
    print(f"ours      forward_chunk of {Ours.window} features, the state holds 3 before them")
    print(f"espnet    chunk_forward of {Espnet.window} features, {overlap} for the second time;")
    print(f"          drops 2 of {CHUNK + 2} frames; trimmed: its modules on {extra}")
    for left in lefts:
        worst = output_difference(encoders, left, args.device)
        print(f"check     left {left * CHUNK}: outputs of {ESPNET} and mha within {worst:.1e}")
    print("\n10^6 multiply-accumulates a chunk: input layer + blocks + their attention\n")
    print("| model | parameters |", *(f"left {left * CHUNK} |" for left in lefts))
    print("|---|---|" + "---|" * len(lefts))
    for name, encoder in encoders.items():
        conf = conf_of(name if name in ATTENTIONS else "mha", args.blocks)
        cells = []
        for left in lefts:
            parts = multiply_accumulates(name, conf, left * CHUNK)
            cells.append(" + ".join(f"{part / 1e6:.0f}" for part in parts))
        parameters = sum(p.numel() for p in encoder.parameters())
        print(f"| {name} | {parameters / 1e6:.2f} M |", *(f"{cell} |" for cell in cells))
    print(flush=True)


def output_difference(encoders: dict, left_chunks: int, device: str) -> float:
    """Largest difference between the outputs of ESPnet's encoder and of ours with its weights."""
    features = noise(device, left_chunks + 3)
    alike = {name: encoders[name] for name in (ESPNET, TRIMMED, "mha", "mha input")}
    streams = open_streams(alike, left_chunks, features).values()
    worst = 0.0
    for pieces in zip(*(stream.pieces(features) for stream in streams), strict=True):
        first, *others = (s.step(piece) for s, piece in zip(streams, pieces, strict=True))
        worst = max(worst, *(float((first - other).abs().max()) for other in others))
    return worst


def run_chunk(encoders: dict, case: Case, args: argparse.Namespace) -> dict:
    """Time of a chunk and bytes of a stream through each encoder with a full left context."""
    features = noise(args.device, case.left_chunks + 1 + args.chunks)
    streams = open_streams(encoders, case.left_chunks, features)
    pieces = {name: stream.pieces(features) for name, stream in streams.items()}
    for name, stream in streams.items():
        stream.run(pieces[name])
    runs = {
        name: partial(stream.run, pieces[name][-args.chunks :]) for name, stream in streams.items()
    }
    spent = by_side(list(rounds(runs, args.device, args.rounds)))
    seconds = {name: [s / args.chunks for s in times] for name, times in spent.items()}

    print(f"One stream, left context of {case.left} frames full, {args.rounds} rounds\n")
    return tabulate_chunk(streams, seconds, case)


def tabulate_chunk(streams: dict[str, Stream], seconds: dict[str, list], case: Case) -> dict:
    """Print the results of `run_chunk`: times, bytes, bars; return the numbers."""
    others = (ESPNET, TRIMMED, "mha")
    print("| model | median ms a chunk |", *(f"x {other} |" for other in others))
    print("|---" * 5 + "|")
    models = {}
    for name, times in seconds.items():
        ratios = {other: ratio(times, seconds[other]) for other in others}
        ms = round(1e3 * statistics.median(times), 2)
        print(f"| {name} | {ms:.2f} |", *(f"{value:.3f} |" for value in ratios.values()))
        models[name] = {"ms": ms, "ratios": ratios} | bytes_of(streams[name])
    print("\nKiB held between two chunks; kept alive: the storage behind them\n")
    print("| model | attention | conv | input | sum | by arithmetic | kept alive |")
    print("|---" * 7 + "|")
    for name, row in models.items():
        held = row["bytes"]
        parts = (*held.values(), sum(held.values()), row["bytes_analytic"], row["bytes_alive"])
        print(f"| {name} |", *(f"{part / 1024:.1f} |" for part in parts))
    print()
    bars = []
    for name, other, most in [("mha", ESPNET, case.most), ("mha", TRIMMED, case.most), MLA_BAR]:
        is_now = models[name]["ratios"][other]
        bars.append({"model": name, "other": other, "most": most, "met": is_now <= most})
        verdict = "met" if is_now <= most else "missed"
        print(f"bar: {name} at most {most} x {other}, is {is_now:.3f}: {verdict}")
    print(flush=True)
    return {"models": models, "bars": bars}


def bytes_of(stream: Stream) -> dict:
    return {
        "bytes": stream.held(),
        "bytes_analytic": stream.held_analytic(),
        "bytes_alive": stream.alive(),
    }


def run_streams(encoders: dict, case: Case, args: argparse.Namespace) -> dict:
    """16 streams in one batch compared with 16 single streams, one chunk of each per round."""
    features = noise(args.device, case.left_chunks + 2, STREAMS)
    print(f"{STREAMS} streams, left context of {case.left} frames full, {args.rounds} rounds\n")
    print("| model | single: ms a chunk of all | one batch: ms | throughput x | bar |  |")
    print("|---" * 6 + "|")
    results = {}
    for name in ATTENTIONS:
        encoder = encoders[name]
        batch = Ours(encoder, case.left_chunks, features)
        singles = [Ours(encoder, case.left_chunks, feature) for feature in features.split(1)]
        for x in batch.pieces(features):
            batch.step(x)
            step_each(singles, x.split(1))
        runs = {"single": partial(step_each, singles, x.split(1)), "batch": partial(batch.step, x)}
        seconds = by_side(list(rounds(runs, args.device, args.rounds)))
        gain = ratio(seconds["single"], seconds["batch"])
        ms = {side: round(1e3 * statistics.median(spent), 1) for side, spent in seconds.items()}
        met = gain >= LEAST_GAIN
        results[name] = {"ms": ms, "throughput": gain, "met": met}
        row = (f"{ms['single']:.1f}", f"{ms['batch']:.1f}", f"{gain:.2f}", f"{LEAST_GAIN}")
        print("|", " | ".join([name, *row, "met" if met else "missed"]), "|", flush=True)
    print(flush=True)
    return results


def run_moves(encoders: dict, case: Case, args: argparse.Namespace) -> dict:
    """One of many streams leaves and another joins, compared with copying the whole batch."""
    features = noise(args.device, case.left_chunks + 2, MANY)
    stay = list(range(1, MANY))
    print(f"{MANY} streams, left context of {case.left} frames full, {args.rounds} rounds\n")
    print("| model | one leaves, one joins: ms | all copied: ms | ratio | bar |  |")
    print("|---" * 6 + "|")
    results = {}
    for name in ATTENTIONS:
        batch = Ours(encoders[name], case.left_chunks, features)
        for x in batch.pieces(features):
            batch.step(x)

        def move(batch: Ours = batch) -> None:
            new = batch.encoder.init_state(left_chunks=batch.state.left_chunks)
            batch.state = batch.state.select(stay)
            batch.state = EncoderState.join([batch.state, new])
            batch.state.claim()  # as the next chunk would do

        runs = {"move": move, "copy": partial(copy.deepcopy, batch.state)}
        seconds = by_side(list(rounds(runs, args.device, args.rounds)))
        is_now = ratio(seconds["move"], seconds["copy"])
        ms = {side: round(1e3 * statistics.median(spent), 2) for side, spent in seconds.items()}
        met = is_now <= MOST_MOVING
        results[name] = {"ms": ms, "ratio": is_now, "met": met}
        row = (f"{ms['move']:.2f}", f"{ms['copy']:.2f}", f"{is_now:.3f}", f"{MOST_MOVING}")
        print("|", " | ".join([name, *row, "met" if met else "missed"]), "|", flush=True)
    print(flush=True)
    return results


def step_each(streams: list[Stream], xs: Sequence[Tensor]) -> None:
    for stream, x in zip(streams, xs, strict=True):
        stream.step(x)


def step_next(stream: Stream, xs: Iterator[Tensor]) -> None:
    stream.step(next(xs))


def run_hour(encoders: dict, case: Case, args: argparse.Namespace) -> dict:
    """Minute 2 of one stream compared with the last minute of another, alternating by chunk."""
    generator = torch.Generator().manual_seed(0)

    def fresh() -> Tensor:
        return torch.randn(1, NEW, MELS, generator=generator).to(args.device)

    begins = {minute: (minute - 1) * FRAMES_PER_MINUTE // CHUNK for minute in (2, args.hour)}
    names = {minute: f"minute {minute}" for minute in begins}
    turns = FRAMES_PER_MINUTE // CHUNK
    print(f"Left context of {case.left} frames, {turns} rounds of one chunk each\n")
    print("| model |", " | ".join(f"{name}: ms a chunk, KiB" for name in names.values()), end="")
    print(" | ratio | bar |  |\n" + "|---" * 6 + "|")
    results = {}
    for name in ATTENTIONS:
        streams = {}
        for minute, begin in begins.items():
            streams[minute] = Ours(encoders[name], case.left_chunks, noise(args.device, 1))
            for _ in range(begin):
                streams[minute].step(fresh())
        pieces = [fresh() for _ in range(turns)]
        runs = {
            minute: partial(step_next, stream, iter(pieces)) for minute, stream in streams.items()
        }
        seconds = by_side(list(rounds(runs, args.device, turns)))
        ageing = ratio(seconds[args.hour], seconds[2])
        met = ageing <= MOST_AGEING
        row, cells = {}, []
        for minute, stream in streams.items():
            ms = round(1e3 * statistics.median(seconds[minute]), 2)
            row[names[minute]] = {"ms": ms} | bytes_of(stream)
            cells.append(f"{ms:.2f}, {sum(stream.held().values()) / 1024:.1f}")
        results[name] = row | {"ratio": ageing, "met": met}
        cells += [f"{ageing:.3f}", f"{MOST_AGEING}", "met" if met else "missed"]
        print("|", " | ".join([name, *cells]), "|", flush=True)
    print(flush=True)
    return results


CASES = {
    "chunk-64": Case(4, run_chunk, most=0.95),
    "chunk-256": Case(16, run_chunk, most=0.75),
    "streams-64": Case(4, run_streams),
    "streams-256": Case(16, run_streams),
    "moves-64": Case(4, run_moves),
    "hour": Case(16, run_hour),
}


@command
def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.hour < 3:
        parser.error(f"--hour {args.hour}: minute 2 is compared with the last; use 3 or more")
    set_up_machine(parser, args)
    encoders = build_ours(args.blocks, args.device)
    espnet = {name: build_espnet(encoders["mha"]) for name in (ESPNET, TRIMMED)}
    encoders = espnet | encoders
    with torch.inference_mode():
        print_card(encoders, args)
        results = {name: CASES[name].run(encoders, CASES[name], args) for name in args.cases}
    print(json.dumps({"benchmark": "streaming", "settings": settings(args), "results": results}))


if __name__ == "__main__":
    sys.exit(main())
