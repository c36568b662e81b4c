"""Convert a trained model to one with a smaller KV cache."""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espnet_kv.bin.model_options import add_model_options, find_model
from espnet_kv.cli import HelpFormatter, Parser, command, whole
from espnet_kv.errors import UserError, one_line

# utterances named in a warning; further ones are counted
SHOWN = 10
PARTS = ("encoder", "decoder_self", "decoder_cross")
TYPES = ("mla", "gqa", "linear")
FEATURE_MAPS = ("elu", "relu", "hedgehog")
# options that determine the result
OPTIONS = (
    "attention_type",
    "kv_rank",
    "num_kv_heads",
    "feature_map",
    "target_compression",
    "parts",
    "calibration_scp",
    "calibration_type",
    "calibration_minutes",
    "transfer_steps",
    "seed",
)


def get_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = Parser(
        description="Convert the attention of a trained ESPnet or espnet_kv model to mla, gqa or "
        "linear. The result is an experiment for asr_inference, asr_train and the recipe.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(add, Path)
    add("--output_dir", type=Path, required=True, help="experiment directory to write")
    add("--attention_type", required=True, choices=TYPES, help="attention of the new model")
    add("--kv_rank", type=int, help="mla: size of the latent, the same in all layers")
    add("--num_kv_heads", type=int, help="gqa: key/value heads, 1 = MQA")
    add("--feature_map", choices=FEATURE_MAPS, help="linear: feature map (default: hedgehog)")
    add(
        "--target_compression",
        type=float,
        help="mla, gqa: instead of a size, the fraction of the attention cache to remove, e.g. "
        "0.875; with mla, layers can get different sizes by their sensitivity, and decoder_cross "
        "one latent for all layers, of at most the model size",
    )
    add(
        "--parts",
        type=_parts,
        default=("encoder",),
        help=f"attention to convert, separated by commas: {', '.join(PARTS)}",
    )
    add(
        "--calibration_scp",
        type=Path,
        help="wav.scp of audio similar to the training data, without transcripts; if missing, only "
        "the weights are used",
    )
    add(
        "--calibration_type",
        choices=("sound", "kaldi_ark"),
        help="type of audio; default: kaldi_ark for archive.ark:offset, else sound",
    )
    add("--calibration_minutes", type=_positive, default=10.0, help="minutes of audio to use")
    add(
        "--transfer_steps",
        type=whole(0, 10**9),
        default=300,
        help="linear: steps of attention transfer",
    )
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of the choice of audio")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts)


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not more than 0, and finite")
    return number


@command
def main(cmd: Sequence[str] | None = None) -> None:
    """Convert.

    Args:
        cmd: the options; None: sys.argv.

    Raises:
        UserError: a model or an option cannot be used.
    """
    args = get_parser().parse_args(cmd)
    find_model(args, kind=Path)
    words = sys.argv[1:] if cmd is None else cmd
    run(args, shlex.join(["python", "-m", "espnet_kv.bin.convert", *words]))


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options recorded in conversion.json."""
    values = {name: getattr(args, name) for name in OPTIONS}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if name == "parts" else value
        for name, value in values.items()
    }


def run(args: argparse.Namespace, command_line: str) -> None:
    """Convert as given by the options; `command_line` is recorded in conversion.json."""
    import torch

    from espnet_kv.convert.calibration import read_calibration
    from espnet_kv.convert.experiment import check_new, describe, write_experiment
    from espnet_kv.convert.measure import FRAMES
    from espnet_kv.convert.model import convert_model
    from espnet_kv.convert.source import load_source
    from espnet_kv.convert.target import Target
    from espnet_kv.espnet.task import ASRTask

    check_new(args.output_dir, args.asr_train_config.parent)
    target = Target(
        args.attention_type,
        args.kv_rank,
        args.num_kv_heads,
        args.feature_map,
        args.target_compression,
        args.transfer_steps,
    )
    print(f"  loading {args.asr_model_file}", flush=True)
    model, config = load_source(args.asr_train_config, args.asr_model_file, args.parts)
    calibration = None
    if args.calibration_scp is None:
        print("  no --calibration_scp: fitted to the weights only (Frobenius norm)", flush=True)
    else:
        calibration = read_calibration(
            args.calibration_scp,
            args.calibration_type,
            args.calibration_minutes,
            args.seed,
            argparse.Namespace(**config),
            ASRTask,
        )
        seconds = calibration.source["seconds"]
        print(
            f"  calibration: {seconds['fit']:g} s to fit to, {seconds['held_out']:g} s held out",
            flush=True,
        )
        for note in calibration.source["notes"]:
            print(f"  note: {note}", flush=True)
        _warn_left_out(calibration.source["left_out"])
    try:
        conversion = convert_model(model, config, args.parts, target, calibration, _counter)
    except torch.linalg.LinAlgError as error:
        raise UserError(
            f"{args.asr_model_file}: its attention cannot be factorised ({one_line(error)}): the "
            "weights are out of range; use the model of another epoch"
        ) from error
    source = None if calibration is None else calibration.source
    provenance = describe(
        args.asr_train_config, args.asr_model_file, options_of(args), command_line, source
    )
    write_experiment(args.output_dir, args.asr_model_file.name, conversion, provenance)
    for part, choice in conversion.choices.items():
        errors = (f"{name}: {error:.4f}" for name, error in choice["errors"].items())
        print(f"  {part}: error on held-out audio: {'; '.join(errors)}", flush=True)
        print(f"  {part}: chosen: {choice['chosen']}", flush=True)
    parameters = conversion.parameters
    for part, cache in conversion.cache.items():
        before, after = cache["before"]["bytes"], cache["after"]["bytes"]
        if cache["after"]["how"].startswith("one pass"):
            print(
                f"  {part}: keys and values {before} -> {after} bytes of {FRAMES} frames, but "
                "whole utterances are encoded in one pass, which keeps no cache: the conversion "
                f"saves parameters ({parameters['before']} -> {parameters['after']} in the "
                "model), not memory in decoding",
                flush=True,
            )
            continue
        print(f"  {part}: attention cache {before} -> {after} bytes", flush=True)
    print(f"  {args.output_dir}", flush=True)


def _warn_left_out(left_out: Mapping[str, Sequence[str]]) -> None:
    """Warn of utterances that are not used."""
    for reason, utterances in left_out.items():
        if utterances:
            named = ", ".join(utterances[:SHOWN]) + (", ..." if len(utterances) > SHOWN else "")
            print(
                f"warning: {len(utterances)} utterances of the calibration audio left out, "
                f"{reason}: {named}",
                file=sys.stderr,
            )


def _counter(label: str, total: int) -> Callable[[], None]:
    """Return a function to call after each step; it prints the count every two seconds."""
    done, printed = 0, time.monotonic()

    def step() -> None:
        nonlocal done, printed
        done += 1
        if done == total or time.monotonic() - printed >= 2:
            printed = time.monotonic()
            print(f"  {label}: {done}/{total}", flush=True)

    return step


if __name__ == "__main__":
    sys.exit(main())
