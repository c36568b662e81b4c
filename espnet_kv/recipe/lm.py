"""Stages 6 to 9: language models; by default they are off."""

import importlib.util
import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError
from espnet_kv.files import commit, new_directory, read_text, write_text
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.jobs import Job
from espnet_kv.recipe.layout import Layout, last_epoch
from espnet_kv.recipe.steps import Step
from espnet_kv.recipe.train import (
    MODES,
    check_keys,
    check_models,
    config_option,
    default_gpus,
    run_options,
)


def lm_stats_step(layout: Layout, before: Sequence[Step]) -> Step:
    """Stage 6: shapes of the LM's training text, the text of the training set.

    Args:
        before: steps of the lengths of both sets and of the tokens.
    """
    out = layout.lm_stats
    new = out.with_name(f".{out.name}.parts")

    def jobs() -> list[Job]:
        shutil.rmtree(new, ignore_errors=True)
        options = _lm_options(layout) | {"collect_stats": True, "ngpu": 0, "output_dir": str(new)}
        for mode in MODES:
            options[f"{mode}_shape_file"] = [str(layout.set_of(mode) / "text")]
        option = config_option(out.with_name(f"{out.name}.log") / "stats.yaml", options)
        log = out.with_name(f"{out.name}.log") / "stats.log"
        return [Job(out.name, "espnet_kv.bin.lm_train", [option], log)]

    def build() -> None:
        with new_directory(out) as partial:
            for mode in MODES:
                shutil.copytree(new / mode, partial / mode)
            layout.write_text_shapes(partial)
            for mode in MODES:
                check_keys(layout, [layout.text_shape(partial, mode)], mode)
        shutil.rmtree(new)

    return Step(
        stage=6,
        name=out.name,
        output=out,
        build=build,
        options={"lm_config": _preprocessing(layout)},
        reads=_texts(layout),
        after=before,
        jobs=jobs,
        products=lambda: [layout.text_shape(out, mode) for mode in MODES],
        skipped=_unless(layout.args.use_lm, "use_lm"),
    )


def train_lm_step(layout: Layout, before: Sequence[Step]) -> Step:
    """Stage 7: train the language model; an interrupted training is resumed.

    Args:
        before: steps of the lengths of both sets, the tokens and the statistics.
    """
    args = layout.args
    exp = layout.lm_exp

    def jobs() -> list[Job]:
        ngpu = default_gpus(args.ngpu)
        options = _lm_options(layout) | {"fold_length": [150]} | run_options(exp, ngpu)
        for mode in MODES:
            options[f"{mode}_shape_file"] = [str(layout.text_shape(layout.lm_stats, mode))]
        run = {"command": args.command, "config": str(args.lm_config), "commit": commit(Path())}
        write_text(exp / "run.json", json.dumps(run, indent=1) + "\n")
        option = config_option(exp / "train.yaml", options)
        epochs = last_epoch(options, args.lm_args)
        more = [option, *shlex.split(args.lm_args)]
        return [Job(exp.name, "espnet_kv.bin.lm_train", more, exp / "train.log", ngpu, epochs)]

    return Step(
        stage=7,
        name=exp.name,
        output=exp,
        build=lambda: check_models(exp),
        options={"lm_config": load_yaml(args.lm_config), "lm_args": args.lm_args}
        if args.use_lm
        else {},
        reads=_texts(layout),
        after=before,
        jobs=jobs,
        products=lambda: [exp / "config.yaml", *sorted(exp.glob("*.ave.pth"))],
        in_place=True,
        precious=True,
        remedy="name this one with --lm_tag",
        skipped=_unless(args.use_lm, "use_lm"),
    )


def perplexity_step(layout: Layout, name: str, trained: Step, formatted: Step) -> Step:
    """Stage 8: perplexity of the language model on a test set, per token."""
    args = layout.args
    out = layout.lm_exp / f"perplexity_{name}"
    new = out.with_name(f".{out.name}.parts")
    text, model = layout.formatted(name) / "text", layout.lm_exp / args.inference_lm
    config = layout.lm_exp / "config.yaml"

    def jobs() -> list[Job]:
        shutil.rmtree(new, ignore_errors=True)
        scored = new / "text"  # without empty lines, which ESPnet cannot score
        lines = read_text(text).splitlines()
        write_text(scored, "".join(f"{line}\n" for line in lines if len(line.split()) > 1))
        options = [
            f"--output_dir={new}",
            *("--ngpu", "0"),
            f"--data_path_and_name_and_type={scored},text,text",
            f"--train_config={config}",
            f"--model_file={model}",
        ]
        log = layout.lm_exp / f"perplexity_{name}.log"
        return [Job(f"perplexity {name}", "espnet_kv.bin.lm_calc_perplexity", options, log)]

    def build() -> None:
        with new_directory(out) as partial:
            shutil.copyfile(new / "ppl", partial / "ppl")
        shutil.rmtree(new)
        print(f"  {name}: perplexity {(out / 'ppl').read_text(encoding='utf-8').strip()}")

    return Step(
        stage=8,
        name=f"perplexity {name}",
        output=out,
        build=build,
        options={"inference_lm": args.inference_lm},
        reads={"text": text, "model": model, "config": config},
        after=[trained, formatted],
        jobs=jobs,
        products=lambda: [out / "ppl"],
        skipped=_unless(args.use_lm, "use_lm"),
    )


def ngram_step(layout: Layout, before: Sequence[Step]) -> Step:
    """Stage 9: an n-gram over tokens, by KenLM.

    Args:
        before: steps of the lengths of the training set and of the tokens.
    """
    args = layout.args
    text = layout.set_of("train") / "text"

    def build() -> None:
        from espnet2.text.build_tokenizer import build_tokenizer

        tokenizer = build_tokenizer(args.token_type, bpemodel=str(layout.bpe_model))
        lines = DataDir.read(text.parent).text.values()
        tokens = "".join(" ".join(tokenizer.text2tokens(line)) + "\n" for line in lines)
        with new_directory(layout.ngram.parent) as partial:
            arpa, binary = partial / "lm.arpa", partial / layout.ngram.name
            order = ["-o", str(args.ngram_num)]
            _run(["lmplz", "--discount_fallback", *order, "--arpa", str(arpa)], tokens)
            _run(["build_binary", "-s", str(arpa), str(binary)], None)

    return Step(
        stage=9,
        name=f"{args.ngram_num}gram",
        output=layout.ngram.parent,
        build=build,
        options={"ngram_num": args.ngram_num},
        reads={"text": text},
        after=before,
        ready=_check_kenlm,
        products=lambda: [layout.ngram],
        skipped=_unless(args.use_ngram, "use_ngram"),
    )


def _check_kenlm() -> None:
    missing = [tool for tool in ("lmplz", "build_binary") if shutil.which(tool) is None]
    if importlib.util.find_spec("kenlm") is None:
        missing.append("the Python package kenlm")
    if missing:
        raise UserError(
            f"--use_ngram true needs KenLM, but {', '.join(missing)} cannot be found: install it "
            f"(https://github.com/kpu/kenlm) or leave --use_ngram false"
        )


def _run(command: list[str], given: str | None) -> None:
    ended = subprocess.run(command, input=given, text=True, capture_output=True)
    if ended.returncode:
        message = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        raise UserError(f"{command[0]} failed: {message[-1]}")


def _unless(wanted: bool, option: str) -> str:
    return "" if wanted else f"--{option} false"


def _texts(layout: Layout) -> dict[str, Path]:
    return {mode: layout.set_of(mode) / "text" for mode in MODES}


def _preprocessing(layout: Layout) -> dict[str, object]:
    """The part of the LM's configuration that affects its statistics."""
    if not layout.args.use_lm:
        return {}
    config = load_yaml(layout.args.lm_config)
    return {key: config[key] for key in ("preprocessor", "preprocessor_conf") if key in config}


def _lm_options(layout: Layout) -> dict[str, object]:
    options: dict[str, object] = load_yaml(layout.args.lm_config) | layout.token_options
    for mode in MODES:
        text = str(layout.set_of(mode) / "text")
        options[f"{mode}_data_path_and_name_and_type"] = [[text, "text", "text"]]
    return options
