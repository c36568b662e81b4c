"""Stages 10 to 12: statistics, training and decoding of speech recognition models."""

import json
import shlex
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from espnet_kv.errors import UserError
from espnet_kv.provenance import commit
from espnet_kv.recipe.atomic import new_directory, write_text
from espnet_kv.recipe.config import load_config
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.jobs import Job, run_jobs, visible_gpus
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.stamp import STAMP, digest, once


def collect_stats(layout: Layout) -> None:
    """Stage 10: shapes and feature statistics, shared by all models of one token list."""
    args = layout.args
    config = _model_config(layout, args.asr_config[0])
    train, valid = layout.dump(layout.train_set), layout.dump(args.valid_set)

    def build() -> None:
        with new_directory(layout.stats) as new:
            config_file = new / "train.yaml"
            config_file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            parts = _split_keys(train, new, args.nj), _split_keys(valid, new, args.nj)
            outputs = [new / f"stats.{n}" for n in range(1, 1 + min(map(len, parts)))]
            jobs = []
            for out, train_keys, valid_keys in zip(outputs, *parts, strict=False):
                command = [
                    *_common_options(layout, config_file, train, valid),
                    *("--collect_stats", "true"),
                    *("--output_dir", str(out)),
                    *("--train_shape_file", str(train_keys)),
                    *("--valid_shape_file", str(valid_keys)),
                    *("--ngpu", "0"),
                ]
                log = args.expdir / f"{layout.stats.name}.log" / f"{out.name}.log"
                jobs.append(Job(out.name, "espnet_kv.bin.asr_train", command, log))
            run_jobs(jobs, args.nj)
            _aggregate(outputs, new)
            for out in outputs:
                shutil.rmtree(out)
            layout.write_text_shapes(new)

    once(
        layout.stats,
        build,
        [train, valid, layout.token_dir],
        frontend=config.get("frontend"),
        frontend_conf=config.get("frontend_conf"),
    )


def train_models(layout: Layout) -> None:
    """Stage 11: train every configuration, `train_nj` at a time; resumes what was cut off."""
    args = layout.args
    train, valid = layout.dump(layout.train_set), layout.dump(args.valid_set)
    jobs = []
    for config_file in args.asr_config:
        config = _model_config(layout, config_file)
        exp = layout.asr_exp(config_file)
        made_from = {
            "config": config,
            "asr_args": args.asr_args,
            "inputs": [digest(train), digest(valid), digest(layout.token_dir)],
        }
        options = [
            *_common_options(layout, exp / "train.yaml", train, valid),
            *("--fold_length", "80000", "--fold_length", "150"),
        ]
        for mode in ("train", "valid"):
            speech_shape = layout.stats / mode / "speech_shape"
            for shape in (speech_shape, layout.text_shape(layout.stats, mode)):
                options += [f"--{mode}_shape_file", str(shape)]
        if args.feats_normalize == "global_mvn":
            stats_file = layout.stats / "train" / "feats_stats.npz"
            options += ["--normalize", "global_mvn"]
            options += ["--normalize_conf", f"stats_file={stats_file}"]
        else:
            options += ["--normalize", args.feats_normalize]
        options += shlex.split(args.asr_args)
        overlay = str(args.overlay) if args.overlay else None
        stated = {"config": str(config_file), "overlay": overlay}
        jobs.append(training_job(args, exp, config, made_from, options, stated))
    run_jobs([job for job in jobs if job is not None], args.train_nj)


def training_job(
    args: Any,
    exp: Path,
    config: dict[str, Any],
    made_from: dict[str, Any],
    options: Sequence[str],
    stated: dict[str, Any],
) -> Job | None:
    """The training of `exp`; None where it is trained already.

    Args:
        args: the options of the recipe.
        config: goes into exp/train.yaml, which `options` name.
        made_from: what the model depends on.
        options: of asr_train.
        stated: goes into run.json, beside command and commit.

    Raises:
        UserError: an earlier training there was of something else.
    """
    stamp = json.dumps(made_from, indent=1, sort_keys=True, default=str) + "\n"
    if _begun(exp, stamp, args):
        return None
    ngpu = default_gpus(args)
    command = [
        *("--output_dir", str(exp)),
        *("--resume", "true"),
        *("--ngpu", str(ngpu)),
        *("--multiprocessing_distributed", "true" if ngpu > 1 else "false"),
        *options,
    ]
    write_text(exp / "train.yaml", yaml.safe_dump(config, sort_keys=False))
    run = {"command": args.command, **stated, "commit": commit(Path())}
    write_text(exp / "run.json", json.dumps(run, indent=1) + "\n")
    write_text(exp / "begun.json", stamp)
    return Job(
        exp.name,
        "espnet_kv.bin.asr_train",
        command,
        exp / "train.log",
        gpus=ngpu,
        epochs=_last_epoch(config, args.asr_args),
        after=partial(write_text, exp / STAMP, stamp),
    )


def _begun(exp: Path, stamp: str, args: Any) -> bool:
    """Whether `exp` is trained already; looks after what an earlier run left.

    Raises:
        UserError: an earlier training there had another configuration or other data.
    """
    begun = exp / "begun.json"
    if begun.exists() and begun.read_text(encoding="utf-8") != stamp:
        raise UserError(
            f"{exp} was trained with another configuration or other data: remove it, or name this "
            f"one with --asr_tag"
        )
    if (exp / STAMP).exists() and (exp / args.inference_asr_model).exists():
        print(f"  {exp} is up to date")
        return True
    return False


def decode(layout: Layout) -> None:
    """Stage 12: decode every test set with every model in `inference_nj` parallel jobs."""
    args = layout.args
    jobs, merges = [], []
    for config_file in args.asr_config:
        exp = layout.asr_exp(config_file)
        model = exp / args.inference_asr_model
        if not model.exists():
            raise UserError(f"{model} does not exist: train first (stage 11)")
        for name in args.test_sets:
            out, dump = exp / layout.inference_name / name, layout.dump(name)
            options = _decoding_options(layout, exp, model, dump)
            digests = [digest(path) for path in (model.resolve(), args.inference_config, dump)]
            made_from = json.dumps([options, *digests, *["streaming"] * args.use_streaming])
            stamp = out / STAMP
            if stamp.exists() and stamp.read_text(encoding="utf-8") == made_from:
                print(f"  {out} is up to date")
                continue
            shutil.rmtree(out, ignore_errors=True)
            parts = _split_keys(dump, out / "logdir", args.inference_nj)
            for n, keys in enumerate(parts, start=1):
                part = out / "logdir" / f"output.{n}"
                command = [*options, "--key_file", str(keys), "--output_dir", str(part)]
                log = out / "logdir" / f"asr_inference.{n}.log"
                title = f"{exp.name} {name} {n}/{len(parts)}"
                module = "asr_inference" + "_streaming" * args.use_streaming
                ngpu = int(args.gpu_inference)
                jobs.append(Job(title, f"espnet_kv.bin.{module}", command, log, gpus=ngpu))
            merges.append((out, len(parts), made_from))
    run_jobs(jobs, args.inference_nj)
    for out, count, made_from in merges:
        for file in ("text", "token", "token_int", "score"):
            lines = []
            for n in range(1, count + 1):
                part = out / "logdir" / f"output.{n}" / "1best_recog" / file
                lines += part.read_text(encoding="utf-8").splitlines()
            write_text(out / file, "".join(f"{line}\n" for line in sorted(lines)))
        write_text(out / STAMP, made_from)


def _decoding_options(layout: Layout, exp: Path, model: Path, dump: Path) -> list[str]:
    args = layout.args
    options = [
        *("--config", str(args.inference_config)),
        *("--ngpu", "1" if args.gpu_inference else "0"),
        *("--data_path_and_name_and_type", f"{dump}/wav.scp,speech,{layout.audio_type}"),
        *("--asr_train_config", str(exp / "config.yaml")),
        *("--asr_model_file", str(model)),
    ]
    if args.use_lm:
        options += ["--lm_train_config", str(layout.lm_exp / "config.yaml")]
        options += ["--lm_file", str(layout.lm_exp / args.inference_lm)]
    if args.use_ngram:
        options += ["--ngram_file", str(layout.ngram)]
    return options + shlex.split(args.inference_args)


def _model_config(layout: Layout, config_file: Path) -> dict[str, Any]:
    config = load_config(config_file, layout.args.overlay)
    encoder = config.get("encoder")
    if not isinstance(encoder, str):
        raise UserError(f"{config_file}: no encoder is named; this is no ASR training config")
    return config


def _common_options(layout: Layout, config: Path, train: Path, valid: Path) -> list[str]:
    """Options that stages 10 and 11 share."""
    options = ["--config", str(config), *layout.token_options]
    for mode, dump in (("train", train), ("valid", valid)):
        name = f"--{mode}_data_path_and_name_and_type"
        options += [name, f"{dump}/wav.scp,speech,{layout.audio_type}"]
        options += [name, f"{dump}/text,text,text"]
    return options


def _split_keys(dump: Path, out: Path, parts: int) -> list[Path]:
    """Write out/SET.keys.N.scp, the utterances of `dump` in up to `parts` even parts."""
    keys = sorted(DataDir.read(dump).wav_scp)
    parts = min(parts, len(keys))
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for n in range(parts):
        file = out / f"{dump.name}.keys.{n + 1}.scp"
        chosen = keys[n * len(keys) // parts : (n + 1) * len(keys) // parts]
        file.write_text("".join(f"{key} x\n" for key in chosen), encoding="utf-8")
        files.append(file)
    return files


def _aggregate(parts: Sequence[Path], out: Path) -> None:
    from espnet2.bin.aggregate_stats_dirs import aggregate_stats_dirs

    aggregate_stats_dirs(parts, out, "WARNING", False)


def _last_epoch(config: dict[str, Any], asr_args: str) -> int:
    words = shlex.split(asr_args)
    if "--max_epoch" in words[:-1]:
        return int(words[words.index("--max_epoch") + 1])
    return config.get("max_epoch", 40)


def default_gpus(args: Any) -> int:
    """GPUs of a training: --ngpu, by default 1 where there is one."""
    return min(1, visible_gpus()) if args.ngpu is None else args.ngpu
