"""Stage 18: every model as ONNX graphs of streaming."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError
from espnet_kv.recipe.decode import require_model
from espnet_kv.recipe.jobs import Job
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.profiling import search_configs
from espnet_kv.recipe.steps import Step

SETTINGS = ("chunk_size", "left_chunks", "cache_dtype")
"""Keys of a decoding configuration that a graph is made for."""


def export_step(layout: Layout, config_file: Path, before: Sequence[Step]) -> Step:
    """Stage 18: EXPERIMENT/onnx, the default graph of `--engine onnx`.

    A model that cannot stream is refused by the command, which knows the reason.

    Args:
        before: steps of the formatted first test set and of the trained model.
    """
    args = layout.args
    exp = layout.asr_exp(config_file)
    out, model, config = exp / "onnx", exp / args.inference_asr_model, exp / "config.yaml"
    dump = layout.formatted(args.test_sets[0])
    decoding = load_yaml(search_configs(layout)[1])
    settings = {name: decoding[name] for name in SETTINGS if name in decoding}

    def ready() -> None:
        for file in (model, config):
            require_model(file)
        if step.is_given:
            raise UserError(f"{out} was not made by this recipe: move it, or remove it")

    def jobs() -> list[Job]:
        shutil.rmtree(out, ignore_errors=True)
        options = [
            f"--asr_train_config={config}",
            f"--asr_model_file={model}",
            f"--check_scp={dump / 'wav.scp'}",
            f"--check_type={layout.audio_type(dump)}",
            f"--output_dir={out}",
            *(f"--{name}={value}" for name, value in settings.items()),
            *shlex.split(args.export_args),
        ]
        return [Job(step.name, "espnet_kv.bin.export", options, exp / "export.log")]

    step = Step(
        stage=18,
        name=f"export {exp.name}",
        output=out,
        build=lambda: print(f"  {out}", flush=True),
        options={
            "inference_asr_model": args.inference_asr_model,
            "settings": settings,
            "export_args": args.export_args,
        },
        reads={"model": model, "config": config, "wav.scp": dump / "wav.scp"},
        after=before,
        ready=ready,
        jobs=jobs,
        products=lambda: sorted(file for file in out.iterdir() if not file.name.startswith(".")),
        skipped="--skip_export true" if args.skip_export else "",
    )
    return step
