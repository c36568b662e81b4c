"""Stage 12: decoding of all test sets with all models."""

import argparse
import dataclasses
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espnet_kv.cli import Parser
from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError
from espnet_kv.files import read_text, write_text
from espnet_kv.recipe.datadir import DataDir, require_keys
from espnet_kv.recipe.jobs import Job
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.steps import Step
from espnet_kv.recipe.train import config_option, part_of, write_keys
from espnet_kv.scores import RECORD, Decoding, other_cache

RESULT_FILES = ("text", "token", "token_int", "score")


def decode_step(layout: Layout, config_file: Path, name: str, before: Sequence[Step]) -> Step:
    """Stage 12: decode a test set in `inference_nj` parallel jobs.

    Args:
        before: steps of the formatted set, the trained model and the language models.
    """
    args = layout.args
    exp = layout.asr_exp(config_file)
    model, dump = exp / args.inference_asr_model, layout.formatted(name)
    out = layout.decoded(config_file, name)
    log_dir = out / "logdir"
    reads = {"model": model, "config": exp / "config.yaml", "wav.scp": dump / "wav.scp"}
    if layout.bpe_model is not None:
        beside = exp / "bpe.model"
        reads["bpe.model"] = beside if beside.exists() else layout.bpe_model
    if args.use_lm:
        reads |= {"lm": layout.lm_exp / args.inference_lm, "lm config": _lm_config(layout)}
    if args.use_ngram:
        reads["ngram"] = layout.ngram
    reads |= _graph(layout, exp)

    def ready() -> None:
        for role in ("model", "config"):
            require_model(reads[role])

    def jobs() -> list[Job]:
        shutil.rmtree(out, ignore_errors=True)
        keys = sorted(DataDir.read(dump).wav_scp)
        count = min(args.inference_nj, len(keys))
        common = [
            config_option(log_dir / "decode.yaml", _options(layout)),
            f"--asr_train_config={reads['config']}",
            f"--asr_model_file={model}",
            f"--data_path_and_name_and_type={dump / 'wav.scp'},speech,{layout.audio_type(dump)}",
        ]
        module = "asr_inference_streaming" if args.use_streaming else "asr_inference"
        made = []
        for n in range(1, count + 1):
            key_file = log_dir / f"keys.{n}.scp"
            write_keys(key_file, part_of(keys, n, count))
            output = log_dir / f"output.{n}"
            more = [f"--key_file={key_file}", f"--output_dir={output}"]
            made.append(
                Job(
                    f"{exp.name} {name} {n}/{count}",
                    f"espnet_kv.bin.{module}",
                    [*common, *more, *shlex.split(args.inference_args)],
                    log_dir / f"asr_inference.{n}.log",
                    int(args.gpu_inference),
                    output=output,
                    shares=True,  # search leaves most of a GPU idle
                )
            )
        return made

    def build() -> None:
        parts = sorted(log_dir.glob("output.*/"), key=lambda path: int(path.suffix[1:]))
        for file in RESULT_FILES:
            lines = [
                line
                for part in parts
                for line in read_text(part / "1best_recog" / file).splitlines()
            ]
            write_text(out / file, "".join(f"{line}\n" for line in sorted(lines)))
        way_out = "look into the logs beside it, then run stage 12 again"
        require_keys({str(out / "text"): out / "text"}, dump, way_out)
        how = Decoding(
            args.use_streaming,
            other_cache(_given(layout).cache_dtype) if args.use_streaming else None,
        )
        record = {**dataclasses.asdict(how), "command": args.command}
        write_text(out / RECORD, json.dumps(record, indent=1) + "\n")

    return Step(
        stage=12,
        name=f"decode {name} with {exp.name}",
        output=out,
        build=build,
        options={
            "inference_config": load_yaml(args.inference_config),
            "inference_args": args.inference_args,
            "inference_asr_model": args.inference_asr_model,
            "use_streaming": args.use_streaming,
            "use_lm": args.use_lm,
            "use_ngram": args.use_ngram,
        },
        reads=reads,
        after=before,
        ready=ready,
        jobs=jobs,
        products=lambda: [out / file for file in (*RESULT_FILES, RECORD)],
    )


def require_model(file: Path) -> None:
    """Raise UserError if a file of a trained model is missing."""
    if not file.is_file():
        raise UserError(
            f"{file} does not exist: train first (stage 11), or name another model with "
            "--inference_asr_model"
        )


def _given(layout: Layout) -> argparse.Namespace:
    """Options of the decoding command, among them engine, onnx_model and cache_dtype."""
    known = Parser(add_help=False, allow_abbrev=False)
    known.add_argument("--engine")
    known.add_argument("--onnx_model", type=Path)
    known.add_argument("--cache_dtype")
    known.set_defaults(**load_yaml(layout.args.inference_config))
    given, _ = known.parse_known_args(shlex.split(layout.args.inference_args))
    return given


def _graph(layout: Layout, exp: Path) -> dict[str, Path]:
    """The graph that streaming with `engine: onnx` decodes with, which may be exported again."""
    given = _given(layout)
    is_used = layout.args.use_streaming and given.engine == "onnx"
    return {"graph": given.onnx_model or exp / "onnx/model.onnx"} if is_used else {}


def _lm_config(layout: Layout) -> Path:
    return layout.lm_exp / "config.yaml"


def _options(layout: Layout) -> dict[str, Any]:
    args = layout.args
    options = load_yaml(args.inference_config) | {"ngpu": int(args.gpu_inference)}
    if args.use_lm:
        options["lm_train_config"] = str(_lm_config(layout))
        options["lm_file"] = str(layout.lm_exp / args.inference_lm)
    if args.use_ngram:
        options["ngram_file"] = str(layout.ngram)
    return options
