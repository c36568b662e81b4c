"""Stage 11 with --convert_from: conversion of a trained experiment instead of training."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from espnet_kv.bin.convert import get_parser
from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError
from espnet_kv.files import commit, write_text
from espnet_kv.recipe.jobs import Job
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.steps import Step
from espnet_kv.recipe.train import MODES, training_data, training_step

# fine-tuning uses this fraction of the learning rate of the original training
FINETUNE_LR = 0.1
# attention_type -> the recipe's option for its size, and the prefix of the size in names
SIZES = {"mla": ("kv_rank", "r"), "gqa": ("num_kv_heads", "g"), "linear": ("feature_map", "")}


@dataclass(frozen=True)
class Converted:
    """One conversion and its fine-tuning.

    options: options of `espnet_kv.bin.convert` that differ between conversions.
    experiment: directory of the conversion.
    fine_tuned: directory of its fine-tuning; None: no fine-tuning.
    """

    options: tuple[str, ...]
    experiment: Path
    fine_tuned: Path | None


def plan(args: argparse.Namespace) -> list[Converted]:
    """The conversions given by the options: one for each value of a list.

    Raises:
        UserError: options exclude each other.
    """
    if args.attention_type not in SIZES:
        raise UserError(
            f"--attention_type {args.attention_type or ''}: --convert_from needs one of "
            f"{', '.join(SIZES)}"
        )
    size, mark = SIZES[args.attention_type]
    for name in {option for option, _ in SIZES.values()} - {size}:
        if getattr(args, name):
            raise UserError(f"--{name}: --attention_type {args.attention_type} does not take it")
    values = getattr(args, size).split() or ["hedgehog"] * (args.attention_type == "linear")
    given = [(size, f"{mark}{value}", value) for value in values]
    given += [
        ("target_compression", f"c{value}", value) for value in args.target_compression.split()
    ]
    if not given:
        raise UserError(f"--attention_type {args.attention_type}: give --{size}")
    if args.finetune_control and not args.finetune_epochs:
        raise UserError("--finetune_control true: give --finetune_epochs: there is none to control")
    marks = parts if (parts := _parts(args)) != ["encoder"] else []
    marks += ["plain"] * (args.calibration_minutes == 0)
    marks += [f"seed{args.convert_seed}"] * (args.convert_seed != 0)
    suffix = "".join(f"_{mark}" for mark in marks)
    return [
        Converted(
            (f"--{option}", value),
            experiment := args.expdir / f"{source_name(args)}_{args.attention_type}_{tag}{suffix}",
            fine_tuned(args, experiment),
        )
        for option, tag, value in given
    ]


def _parts(args: argparse.Namespace) -> list[str]:
    return args.convert_parts.replace(",", " ").split()


def source_name(args: argparse.Namespace) -> str:
    """The name of the source, with the prefix asr_ by which stage 13 finds experiments."""
    name = args.convert_from.name
    return name if name.startswith("asr_") else f"asr_{name}"


def fine_tuned(args: argparse.Namespace, experiment: Path) -> Path | None:
    """Directory of the fine-tuning of an experiment; None: no fine-tuning."""
    if not args.finetune_epochs:
        return None
    tag = f"_ft{args.finetune_epochs}"
    tag += f"x{args.finetune_iters}" if args.finetune_iters else ""
    tag += f"_lr{args.finetune_lr:g}" if args.finetune_lr else ""
    return args.expdir / f"{experiment.name}{tag}"


def control(args: argparse.Namespace) -> Path | None:
    """Directory of the same fine-tuning of the source; None: not requested."""
    if not args.finetune_control:
        return None
    return fine_tuned(args, args.expdir / source_name(args))


def experiments(args: argparse.Namespace) -> list[Path]:
    """All experiments for stages 12 to 15; the source is first if it is in the same directory."""
    beside = args.convert_from.resolve().parent == args.expdir.resolve()
    found = [args.convert_from] if beside else []
    for converted in plan(args):
        found += [converted.experiment, converted.fine_tuned]
    return [experiment for experiment in (*found, control(args)) if experiment is not None]


def convert_step(layout: Layout, converted: Converted, before: Sequence[Step]) -> Step:
    """Stage 11: one conversion.

    Args:
        before: the steps that make the calibration audio.
    """
    args = layout.args
    out = converted.experiment
    source = {
        "config": args.convert_from / "config.yaml",
        "model": args.convert_from / args.inference_asr_model,
    }

    def ready() -> None:
        for file in source.values():
            if not file.is_file():
                raise UserError(f"{file} does not exist: --convert_from names a trained experiment")

    get_parser().parse_args(_command(layout, converted, source))  # reports errors before any work

    def jobs() -> list[Job]:
        if (out / "conversion.json").exists():  # interrupted between the work and its stamp
            return []
        command = _command(layout, converted, source)
        log = args.expdir / "convert_logs" / f"{out.name}.log"
        return [Job(out.name, "espnet_kv.bin.convert", command, log)]

    reads = dict(source)
    if args.calibration_minutes:
        reads["calibration audio"] = _calibration_scp(layout)
    return Step(
        stage=11,
        name=out.name,
        output=out,
        build=partial(_state_run, layout, out),
        options={
            "attention_type": args.attention_type,
            converted.options[0].removeprefix("--"): converted.options[1],
            "convert_parts": _parts(args),
            "convert_seed": args.convert_seed,
            "calibration_minutes": args.calibration_minutes,
        },
        reads=reads,
        after=before if args.calibration_minutes else [],
        ready=ready,
        jobs=jobs,
        products=lambda: [out / "config.yaml", out / args.inference_asr_model],
        precious=True,
        version=3,
        remedy="give another --expdir",
    )


def is_untrained(args: argparse.Namespace) -> bool:
    """Whether the source has no training data, as the released weights of Whisper.

    It is then fine-tuned on the sets of the recipe.
    """
    file = args.convert_from / "config.yaml"
    return file.is_file() and not load_yaml(file).get("train_data_path_and_name_and_type")


def fine_tuning_step(layout: Layout, start: Path, directory: Path, before: Sequence[Step]) -> Step:
    """Stage 11: fine-tuning of the model in `start` with the options of its training.

    Args:
        before: the conversion, except for the control, and statistics that are made for it.
    """
    args = layout.args
    names = ("finetune_epochs", "finetune_iters", "finetune_lr", "asr_args")
    model = start / args.inference_asr_model
    return training_step(
        layout,
        directory,
        partial(_fine_tuning_config, layout, start, directory),
        stated={
            "finetune": {
                "start": str(model),
                "epochs": args.finetune_epochs,
                "iterations_per_epoch": args.finetune_iters,
                "lr": args.finetune_lr or f"{FINETUNE_LR} of the source's",
            }
        },
        options={name: getattr(args, name) for name in names},
        reads={"model": model, "config": start / "config.yaml"},
        after=before,
        ready=lambda: _check_training_files(start / "config.yaml"),
        remedy="give another --expdir",
    )


def report_step(layout: Layout, converted: Converted, scored: Sequence[Step]) -> Step:
    """Stage 13: add the word error rates of a conversion to its report."""
    args = layout.args

    def build() -> None:
        from espnet_kv.convert.record import update_report

        related = {"before": args.convert_from, "after": converted.experiment}
        if converted.fine_tuned is not None:
            related["fine_tuned"] = converted.fine_tuned
            if (directory := control(args)) is not None:
                related["control"] = directory
        update_report(converted.experiment, related)
        if converted.fine_tuned is not None:
            update_report(converted.fine_tuned, related)
        print(f"  report: {converted.experiment / 'conversion.md'}")

    return Step(
        stage=13,
        name=f"report of {converted.experiment.name}",
        output=converted.experiment,
        build=build,
        after=scored,
        stamp=converted.experiment / ".reported.done.json",
        in_place=True,
        always=True,
    )


def _command(layout: Layout, converted: Converted, source: dict[str, Path]) -> list[str]:
    args = layout.args
    options = [
        f"--asr_train_config={source['config']}",
        f"--asr_model_file={source['model']}",
        *("--attention_type", args.attention_type, *converted.options),
        *("--parts", ",".join(_parts(args))),
        *("--seed", str(args.convert_seed)),
        f"--output_dir={converted.experiment}",
    ]
    if args.calibration_minutes:
        options += [f"--calibration_scp={_calibration_scp(layout)}"]
        options += ["--calibration_type", layout.audio_type(_calibration_scp(layout).parent)]
        options += ["--calibration_minutes", f"{args.calibration_minutes:g}"]
    return options


def _calibration_scp(layout: Layout) -> Path:
    return layout.dump(layout.train_set) / "wav.scp"


def _state_run(layout: Layout, experiment: Path) -> None:
    run = {"command": layout.args.command, "commit": commit(Path())}
    write_text(experiment / "run.json", json.dumps(run, indent=1) + "\n")


def _fine_tuning_config(layout: Layout, start: Path, directory: Path) -> dict[str, Any]:
    """train.yaml of the fine-tuning; also writes the record of the conversion beside it."""
    from espnet_kv.convert.experiment import training_config
    from espnet_kv.convert.record import FILE

    args = layout.args
    model = start / args.inference_asr_model
    config = training_config(load_yaml(start / "config.yaml"), model)
    optim = config.get("optim_conf") or {}
    if args.finetune_lr is None and "lr" not in optim:
        raise UserError(f"{start / 'config.yaml'} names no learning rate: give --finetune_lr")
    lr = args.finetune_lr or FINETUNE_LR * float(optim["lr"])
    config |= {
        "max_epoch": args.finetune_epochs,
        "num_iters_per_epoch": args.finetune_iters,
        "keep_nbest_models": min(
            args.finetune_epochs, _most_kept(config.get("keep_nbest_models", 10))
        ),
        "patience": None,
        "optim_conf": {**optim, "lr": lr},
        "scheduler": None,
        "scheduler_conf": {},
    }
    if is_untrained(args):
        config |= training_data(layout, layout.stats(args.convert_from / "config.yaml"))
    if (start / FILE).exists():
        record = json.loads((start / FILE).read_text(encoding="utf-8"))
        stated = {"start": str(model), "epochs": args.finetune_epochs}
        stated |= {"iterations_per_epoch": args.finetune_iters, "lr": lr}
        write_text(directory / FILE, json.dumps(record | {"finetune": stated}, indent=1) + "\n")
    return config


def _most_kept(kept: int | list[int]) -> int:
    return max(kept) if isinstance(kept, list) else kept


def _check_training_files(config_file: Path) -> None:
    """Raise UserError if a training file of the model of `config_file` is missing."""
    config = load_yaml(config_file)
    files = [Path(file) for mode in MODES for file in config.get(f"{mode}_shape_file") or ()]
    for mode in MODES:
        listed = config.get(f"{mode}_data_path_and_name_and_type") or ()
        files += [Path(path) for path, *_ in listed]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} does not exist, but {config_file} was trained on it: fine-tune in the "
                "directory where it was trained"
            )
