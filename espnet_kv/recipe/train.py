"""Stages 10 and 11: statistics and training of speech recognition models."""

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from espnet_kv.config import front_end, load_yaml
from espnet_kv.files import commit, new_directory, write_text
from espnet_kv.recipe import whisper_models
from espnet_kv.recipe.datadir import DataDir, require_keys
from espnet_kv.recipe.jobs import Job, visible_gpus
from espnet_kv.recipe.layout import Layout, last_epoch
from espnet_kv.recipe.steps import Step

MODES = ("train", "valid")
PART = 500
"""Utterances per job of statistics, with at most MOST_PARTS jobs."""
MOST_PARTS = 32


def stats_step(layout: Layout, config_file: Path, before: Sequence[Step]) -> Step:
    """Stage 10: shapes and feature statistics, shared by models of one front end and token list.

    Args:
        before: steps of the lengths of both sets and of the tokens.
    """
    args = layout.args
    config = layout.model_config(config_file)
    # else only lengths are collected, without building the model
    has_features = (config.get("model_conf") or {}).get("extract_feats_in_collect_stats", True)
    out = layout.stats(config_file)
    new = out.with_name(f".{out.name}.parts")

    def jobs() -> list[Job]:
        shutil.rmtree(new, ignore_errors=True)
        keys = {mode: sorted(DataDir.read(layout.set_of(mode)).wav_scp) for mode in MODES}
        # not more parts than utterances of a set, and independent of --nj, because features are
        # computed in padded batches, which affect the last frames of an utterance
        count = min(len(keys["train"]) // PART + 1, MOST_PARTS, *map(len, keys.values()))
        trainable = config
        if args.convert_from is not None:
            from espnet_kv.convert.experiment import training_config  # loads ESPnet

            trainable = training_config(config)
        made = []
        for n in range(1, count + 1):
            part = new / f"stats.{n}"
            options = trainable | layout.data_options | {"collect_stats": True, "ngpu": 0}
            options["output_dir"] = str(part)
            for mode in MODES:
                file = new / f"{mode}.keys.{n}.scp"
                write_keys(file, part_of(keys[mode], n, count))
                options[f"{mode}_shape_file"] = [str(file)]
            more = [config_option(new / f"stats.{n}.yaml", options), *shlex.split(args.asr_args)]
            log = args.expdir / f"{out.name}.log" / f"{part.name}.log"
            name = f"{out.name} {n}/{count}"
            made.append(Job(name, "espnet_kv.bin.asr_train", more, log, output=part))
        return made

    def build() -> None:
        from espnet2.bin.aggregate_stats_dirs import aggregate_stats_dirs

        parts = sorted(new.glob("stats.*/"), key=lambda path: int(path.suffix[1:]))
        with new_directory(out) as partial_dir:
            aggregate_stats_dirs(parts, partial_dir, "WARNING", False)
            layout.write_text_shapes(partial_dir)
            for mode in MODES:
                check_keys(layout, layout.shape_files(partial_dir, mode), mode)
        shutil.rmtree(new)

    return Step(
        stage=10,
        name=out.name,
        output=out,
        build=build,
        options={
            "asr_config": front_end(config, args.asr_args),
            "cleaner": layout.token_options["cleaner"],
        },
        after=before,
        jobs=jobs,
        products=lambda: [
            *([out / "train" / "feats_stats.npz"] if has_features else []),
            *(shapes for mode in MODES for shapes in layout.shape_files(out, mode)),
        ],
    )


def train_step(layout: Layout, config_file: Path, before: Sequence[Step]) -> Step:
    """Stage 11: train one configuration; an interrupted training is resumed.

    Args:
        before: steps of the lengths of both sets, the tokens and the statistics; that of the tokens
            if the configuration has no epochs.
    """
    args = layout.args
    exp, stats = layout.asr_exp(config_file), layout.stats(config_file)
    trains = layout.trains(config_file)
    normalize = None if args.feats_normalize in ("", "none") else args.feats_normalize

    def make_config() -> dict[str, Any]:
        config = layout.model_config(config_file)
        if not trains:
            return config | layout.token_options | {"normalize": normalize}
        config |= training_data(layout, stats) | {"normalize": normalize}
        if args.feats_normalize == "global_mvn":
            config["normalize_conf"] = {"stats_file": str(stats / "train" / "feats_stats.npz")}
        else:
            config.pop("normalize_conf", None)
        return config

    overlay = load_yaml(args.overlay) if args.overlay else None
    return training_step(
        layout,
        exp,
        make_config,
        stated={"config": str(config_file), "overlay": args.overlay and str(args.overlay)},
        options={"asr_config": load_yaml(config_file), "overlay": overlay}
        | {"asr_args": args.asr_args, "feats_normalize": args.feats_normalize}
        | {"cleaner": layout.token_options["cleaner"], "whisper_model": args.whisper_model},
        reads=whisper_models.weights(layout.model_config(config_file)),
        after=before,
        remedy="name this one with --asr_tag",
    )


def training_data(layout: Layout, stats: Path) -> dict[str, Any]:
    """ESPnet's options for training on the sets of the recipe, with the shapes in `stats`."""
    options = layout.data_options | {"fold_length": [80000, 150]}
    for mode in MODES:
        options[f"{mode}_shape_file"] = [str(file) for file in layout.shape_files(stats, mode)]
    return options


def training_step(
    layout: Layout,
    exp: Path,
    make_config: Callable[[], dict[str, Any]],
    *,
    stated: Mapping[str, Any],
    **fields: Any,
) -> Step:
    """A resumable training in `exp`.

    Args:
        make_config: returns the whole configuration when the training begins; it is written to
            exp/train.yaml.
        stated: entries of run.json beside command and commit.
        fields: other fields of the Step.
    """
    args = layout.args

    def jobs() -> list[Job]:
        chosen = make_config()
        ngpu = default_gpus(args.ngpu)
        chosen |= run_options(exp, ngpu)
        run = {"command": args.command, **stated, "commit": commit(Path())}
        write_text(exp / "run.json", json.dumps(run, indent=1) + "\n")
        more = [config_option(exp / "train.yaml", chosen), *shlex.split(args.asr_args)]
        epochs = last_epoch(chosen, args.asr_args)
        log = exp / "train.log"
        return [Job(exp.name, "espnet_kv.bin.asr_train", more, log, ngpu, epochs)]

    return Step(
        stage=11,
        name=exp.name,
        output=exp,
        build=partial(_finish_training, layout, exp),
        jobs=jobs,
        products=lambda: [exp / "config.yaml", *sorted(exp.glob("*.ave.pth"))],
        in_place=True,
        precious=True,
        **fields,
    )


def default_gpus(given: int | None) -> int:
    """GPUs of one training; by default one if available."""
    return min(1, visible_gpus()) if given is None else given


def run_options(exp: Path, ngpu: int) -> dict[str, Any]:
    """ESPnet's options for the output directory and the devices of a training."""
    return {
        "output_dir": str(exp),
        "resume": True,
        "ngpu": ngpu,
        "multiprocessing_distributed": ngpu > 1,
    }


def _finish_training(layout: Layout, exp: Path) -> None:
    """Check the models, and copy the token list and BPE model beside them."""
    check_models(exp)
    for file in (layout.token_list, layout.bpe_model):
        if file is not None and file.exists():
            shutil.copyfile(file, exp / file.name)


def check_models(exp: Path) -> None:
    """Raise UserError if an averaged model of an experiment is damaged or not finite."""
    from espnet_kv.espnet.loading import read_checkpoint, refuse_not_finite  # loads torch

    for model in exp.glob("*.ave.pth"):
        refuse_not_finite(read_checkpoint(model), model)


def write_keys(file: Path, keys: Sequence[str]) -> None:
    """Write a key file for ESPnet, which reads only the first column."""
    write_text(file, "".join(f"{key} x\n" for key in keys))


def part_of(keys: Sequence[str], n: int, count: int) -> Sequence[str]:
    """Part n (from 1) of `count` consecutive parts of equal size."""
    return keys[(n - 1) * len(keys) // count : n * len(keys) // count]


def config_option(file: Path, options: Mapping[str, Any]) -> str:
    """Write the options to a YAML and return the option --config.

    On the command line ESPnet would split paths at commas and `#`.
    """
    write_text(file, yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))
    return f"--config={file}"


def check_keys(layout: Layout, files: Sequence[Path], mode: str) -> None:
    """Check that shape files list all utterances, because training batches are made from them.

    Raises:
        UserError: statistics and dump have different utterances.
    """
    named = {f"{file.name} of the {mode} statistics": file for file in files}
    require_keys(named, layout.set_of(mode), "run stage 10 again")
