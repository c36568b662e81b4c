"""Errors of three methods to reduce keys and values to one latent, on held-out audio."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import settings
from torch import Tensor

from espnet_kv.bin.convert import PARTS
from espnet_kv.cli import command

WAYS = ("plain SVD", "activation-aware", "bin.convert")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Errors of a factorisation by the weights, by the activations, and of "
        "espnet_kv.bin.convert, the same rank in all layers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("experiment", type=Path, help="a trained experiment with mha")
    add("--model", default="valid.acc.ave.pth", help="its checkpoint")
    add("--wav_scp", type=Path, required=True, help="calibration audio from the dump")
    add("--audio_type", default="kaldi_ark", choices=("kaldi_ark", "sound"), help="type of audio")
    add("--minutes", type=float, default=10.0, help="minutes of audio; a fifth is held out")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="which attention")
    add("--cuts", type=float, nargs="+", default=[0.5, 0.75, 0.875, 0.9375], help="that go")
    return parser


def activation_error(attention: Any, down: Tensor, ups: Tensor, x: Tensor) -> float:
    """sqrt(E |W x - up down x|^2 / E |W x|^2), W = [W_k; W_v], over frames x (N, D)."""
    wanted = x @ torch.cat([attention.linear_k.weight, attention.linear_v.weight]).T
    return float((wanted - x @ down.T @ ups.T).norm() / wanted.norm())


@torch.no_grad()
def measure(attention: Any, seen: Sequence, unseen: Sequence, rank: int) -> dict:
    """Errors of one layer: method -> activation error (None: not minimised), output error."""
    from espnet_kv.convert.calls import rows
    from espnet_kv.convert.factorize import factorize_kv, to_mla
    from espnet_kv.convert.layer_error import output_error
    from espnet_kv.convert.statistics import LayerStatistics

    known = LayerStatistics.of(attention, seen)
    x = rows(unseen, "frames", lambda call: call.key)
    k, v = attention.linear_k.weight, attention.linear_v.weight
    result = {}
    for way, moment in zip(WAYS, (None, known.second_moment), strict=False):
        down, up_k, up_v = factorize_kv(k, v, rank, moment)
        new = to_mla(attention, rank)
        new.linear_kv_down.weight.copy_(down)
        new.linear_k_up.weight.copy_(up_k)
        new.linear_v_up.weight.copy_(up_v)
        ups = torch.cat([up_k, up_v])
        activations = activation_error(attention, down, ups, x)
        result[way] = {"activations": activations, "output": output_error(attention, new, unseen)}
    ours = to_mla(attention, rank, known)
    result[WAYS[2]] = {"activations": None, "output": output_error(attention, ours, unseen)}
    return result


@command
def main(argv: list[str] | None = None) -> None:
    from espnet_kv.convert.calibration import CalibrationRunner, read_calibration
    from espnet_kv.convert.calls import recording
    from espnet_kv.convert.source import PARTS as SLOTS
    from espnet_kv.convert.source import load_source
    from espnet_kv.espnet.task import ASRTask

    args = get_parser().parse_args(argv)
    config_file, model_file = args.experiment / "config.yaml", args.experiment / args.model
    model, config = load_source(config_file, model_file, tuple(args.parts))
    audio = read_calibration(
        args.wav_scp, args.audio_type, args.minutes, 0, argparse.Namespace(**config), ASRTask
    )
    runner = CalibrationRunner(model, decoding=any(part != "encoder" for part in args.parts))
    runner.transcribe([*audio.fit, *audio.held_out], lambda: None)
    layers = {part: SLOTS[part].attentions(model) for part in args.parts}
    every = {name: layer for named in layers.values() for name, layer in named.items()}
    with recording(every) as seen:
        runner.backward(audio.fit)
    with recording(every) as unseen:
        runner.run(audio.held_out)

    seconds = audio.source["seconds"]
    print(f"{args.experiment}: {seconds['fit']} s to fit to, {seconds['held_out']} s to measure on")
    print("median over layers of the relative error of keys and values / of the output\n")
    print(f"| part | cut % | rank | {' | '.join(WAYS)} |")
    print("|---" * (3 + len(WAYS)) + "|")
    results = []
    for part, named in layers.items():
        for cut in args.cuts:
            width = 2 * next(iter(named.values())).linear_k.out_features
            rank = round((1 - cut) * width)
            rows = {n: measure(a, seen[n], unseen[n], rank) for n, a in named.items()}
            results.append({"part": part, "cut": cut, "rank": rank, "layers": rows})
            cells = []
            for way in WAYS:
                both = [
                    [row[way][key] for row in rows.values()] for key in ("activations", "output")
                ]
                cells.append(
                    " / ".join("-" if None in x else f"{statistics.median(x):.3f}" for x in both)
                )
            print(f"| {part} | {100 * cut:g} | {rank} | {' | '.join(cells)} |", flush=True)
    facts = {"benchmark": "factorization", "settings": settings(args), "results": results}
    print(json.dumps(facts, default=str))


if __name__ == "__main__":
    sys.exit(main())
