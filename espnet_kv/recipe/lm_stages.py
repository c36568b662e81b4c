"""Stages 6 to 9: language models, off unless asked for."""

import importlib.util
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.config import load_yaml
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.jobs import Job, run_jobs
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.model_stages import default_gpus
from espnet_kv.recipe.stamp import once


def collect_lm_stats(layout: Layout) -> None:
    """Stage 6: shapes of the LM's training text, which is that of the training set."""
    if not layout.args.use_lm:
        print("  skipped: --use_lm false")
        return
    out, inputs = layout.lm_stats, _lm_inputs(layout)

    def build() -> None:
        command = [
            *_lm_options(layout),
            *("--collect_stats", "true", "--output_dir", str(out), "--ngpu", "0"),
            *("--train_shape_file", str(_lm_text(layout, layout.train_set))),
            *("--valid_shape_file", str(_lm_text(layout, layout.args.valid_set))),
        ]
        run_jobs([Job(out.name, "espnet_kv.bin.lm_train", command, out / "collect_stats.log")], 1)
        layout.write_text_shapes(out)

    once(out, build, inputs)


def train_lm(layout: Layout) -> None:
    """Stage 7: train the language model."""
    args = layout.args
    if not args.use_lm:
        print("  skipped: --use_lm false")
        return
    exp = layout.lm_exp
    config = load_yaml(args.lm_config)

    def build() -> None:
        ngpu = default_gpus(args)
        command = [
            *_lm_options(layout),
            *("--output_dir", str(exp), "--resume", "true", "--fold_length", "150"),
            *("--ngpu", str(ngpu)),
            *("--multiprocessing_distributed", "true" if ngpu > 1 else "false"),
        ]
        for mode in ("train", "valid"):
            command += [f"--{mode}_shape_file", str(layout.text_shape(layout.lm_stats, mode))]
        command += shlex.split(args.lm_args)
        epochs = config.get("max_epoch", 40)
        log = exp / "train.log"
        job = Job(exp.name, "espnet_kv.bin.lm_train", command, log, gpus=ngpu, epochs=epochs)
        run_jobs([job], 1)

    once(exp, build, [*_lm_inputs(layout), args.lm_config], lm_args=args.lm_args)


def lm_perplexity(layout: Layout) -> None:
    """Stage 8: perplexity of the language model on the test sets, per token."""
    args = layout.args
    if not args.use_lm:
        print("  skipped: --use_lm false")
        return
    for name in args.test_sets:
        out = layout.lm_exp / f"perplexity_{name}"
        text = _lm_text(layout, name)
        command = [
            *("--output_dir", str(out), "--ngpu", "0"),
            *("--data_path_and_name_and_type", f"{text},text,text"),
            *("--train_config", str(layout.lm_exp / "config.yaml")),
            *("--model_file", str(layout.lm_exp / args.inference_lm)),
        ]
        job = Job(
            f"perplexity {name}", "espnet2.bin.lm_calc_perplexity", command, out / "perplexity.log"
        )
        once(out, partial(run_jobs, [job], 1), [text, layout.lm_exp / "config.yaml"])
        print(f"  {name}: perplexity {(out / 'ppl').read_text(encoding='utf-8').strip()}")


def train_ngram(layout: Layout) -> None:
    """Stage 9: an n-gram over tokens, by KenLM."""
    args = layout.args
    if not args.use_ngram:
        print("  skipped: --use_ngram false")
        return
    missing = [tool for tool in ("lmplz", "build_binary") if shutil.which(tool) is None]
    if importlib.util.find_spec("kenlm") is None:
        missing.append("the Python package kenlm")
    if missing:
        raise UserError(
            f"--use_ngram true needs KenLM, but {', '.join(missing)} cannot be found: install it "
            f"(https://github.com/kpu/kenlm) or leave --use_ngram false"
        )
    from espnet2.text.build_tokenizer import build_tokenizer

    tokenizer = build_tokenizer(args.token_type, bpemodel=str(layout.bpe_model))
    train_dir = layout.dump(layout.train_set)

    def build() -> None:
        lines = DataDir.read(train_dir).text.values()
        text = "".join(" ".join(tokenizer.text2tokens(line)) + "\n" for line in lines)
        arpa = layout.ngram.with_suffix(".arpa")
        lmplz = ["lmplz", "--discount_fallback", "-o", str(args.ngram_num), "--arpa", str(arpa)]
        for command, given in (
            (lmplz, text),
            (["build_binary", "-s", str(arpa), str(layout.ngram)], None),
        ):
            ended = subprocess.run(command, input=given, text=True, capture_output=True)
            if ended.returncode:
                raise UserError(f"{command[0]} failed: {ended.stderr.strip().splitlines()[-1]}")

    layout.ngram.parent.mkdir(parents=True, exist_ok=True)
    once(layout.ngram.parent, build, [train_dir, layout.token_dir], ngram_num=args.ngram_num)


def _lm_text(layout: Layout, name: str) -> Path:
    return layout.dump(name) / "text"


def _lm_inputs(layout: Layout) -> list[Path]:
    sets = (layout.train_set, layout.args.valid_set)
    return [*(_lm_text(layout, name) for name in sets), layout.token_dir]


def _lm_options(layout: Layout) -> list[str]:
    args = layout.args
    options = ["--config", str(args.lm_config), *layout.token_options]
    for mode, name in (("train", layout.train_set), ("valid", args.valid_set)):
        option = f"--{mode}_data_path_and_name_and_type"
        options += [option, f"{_lm_text(layout, name)},text,text"]
    return options
