"""Stages 14 and 15: profiles of all models, and their comparison."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError
from espnet_kv.profile.schema import (
    SCHEMA,
    Profile,
    read_profile,
    read_profiles,
    write_profile,
)
from espnet_kv.recipe.decode import require_model
from espnet_kv.recipe.jobs import Job
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import DECODE, DECODE_STREAMING
from espnet_kv.recipe.steps import Step
from espnet_kv.recipe.train import default_gpus
from espnet_kv.scores import read_scores


def profile_step(layout: Layout, config_file: Path, before: Sequence[Step]) -> Step:
    """Stage 14: write EXPERIMENT/profile/profile.json of one model.

    Args:
        before: steps of the formatted first test set and of the trained model.
    """
    args = layout.args
    exp = layout.asr_exp(config_file)
    out, model = exp / "profile", exp / args.inference_asr_model
    search, streaming = search_configs(layout)
    wav_scp = layout.formatted(args.test_sets[0]) / "wav.scp"

    def jobs() -> list[Job]:
        ngpu = min(1, default_gpus(args.ngpu))
        options = [
            f"--experiment={exp}",
            f"--inference_asr_model={args.inference_asr_model}",
            f"--wav_scp={wav_scp}",
            f"--inference_config={search}",
            f"--streaming_config={streaming}",
            *("--ngpu", str(ngpu)),
            *shlex.split(args.profile_args),
            f"--decoding={layout.inference_name}",
        ]
        log = out / "profile.log"
        print(f"  profiling {exp.name}, log in {log}", flush=True)
        return [Job(f"profile {exp.name}", "espnet_kv.bin.profile", options, log, ngpu)]

    return Step(
        stage=14,
        name=f"profile {exp.name}",
        output=out,
        build=lambda: print(out / "profile.json"),
        ready=lambda: require_model(model),
        jobs=jobs,
        options={
            "profile_args": args.profile_args,
            "schema": SCHEMA,  # profiles of different versions cannot be compared
            "inference_config": load_yaml(search),
            "streaming": load_yaml(streaming),
            "inference_asr_model": args.inference_asr_model,
            "ngpu": args.ngpu,
        },
        reads={"model": model, "config": exp / "config.yaml", "wav.scp": wav_scp}
        | {graph.name: graph for graph in (exp / "onnx").glob("*.onnx")},
        after=before,
        products=lambda: [out / "profile.json"],
        in_place=True,
        editable=True,  # rates_step updates the error rates in it
    )


def rates_step(layout: Layout, config_file: Path, profiled: Step) -> Step:
    """Stage 14: update the error rates in one profile."""
    exp = layout.asr_exp(config_file)
    return Step(
        stage=14,
        name=f"error rates of {exp.name}",
        output=profiled.output,
        build=lambda: _refresh_scores(exp, layout.inference_name),
        after=[profiled],
        stamp=profiled.output / ".rates.done.json",
        in_place=True,
        always=True,
    )


def compare_step(layout: Layout, profiled: Sequence[Step]) -> Step:
    """Stage 15: write EXPDIR/report and the table in RESULTS.md from all profiles."""
    args = layout.args
    out = args.expdir / "report"

    def build() -> None:
        own = [layout.asr_exp(config) / "profile/profile.json" for config in args.asr_config]
        there = [*args.expdir.glob("*/profile/profile.json"), *filter(Path.is_file, own)]
        paths = sorted({path.resolve(): path for path in there}.values())
        if not paths:
            raise UserError(
                f"{args.expdir} holds no */profile/profile.json: profile first (stage 14)"
            )
        from espnet_kv.report.write import TITLE, write_report  # takes a second: pandas, matplotlib

        page = write_report(read_profiles(paths), out, args.results, TITLE, args.command)
        print(f"  page: {page.resolve()}")
        print(f"  scalars: tensorboard --logdir {args.expdir.resolve()}")

    return Step(
        stage=15,
        name="report",
        output=out,
        build=build,
        after=list(profiled),
        in_place=True,
        always=True,
    )


def search_configs(layout: Layout) -> tuple[Path, Path]:
    """The decoding configurations of whole utterances and of streaming."""
    args = layout.args
    if args.use_streaming:
        return DECODE, args.inference_config
    return args.inference_config, DECODE_STREAMING


def _refresh_scores(exp: Path, decoding: str) -> None:
    file = exp / "profile" / "profile.json"
    profile = read_profile(file)
    content = profile.model_dump(by_alias=True)
    # keep the decodings in the profile, for the kind that this run does not decode
    named = {row["decoding"] or "" for sets in content["wer"].values() for row in sets.values()}
    wer = read_scores(exp, [decoding, *sorted(named)])
    refreshed = Profile.model_validate(content | {"wer": wer})
    if refreshed != profile:
        write_profile(file, refreshed.model_dump(by_alias=True))
