"""Stage 14: profile every model."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.atomic import write_text
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.logs import last_error
from espnet_kv.recipe.options import DECODE, DECODE_STREAMING
from espnet_kv.recipe.scores import read_scores
from espnet_kv.recipe.stamp import once


def profile_models(layout: Layout) -> None:
    """Write EXPERIMENT/profile/profile.json of every model, one after the other.

    A profile that is there is kept while model, audio and options stay the same; its error rates
    are read again.
    """
    args = layout.args
    for config_file in args.asr_config:
        exp = layout.asr_exp(config_file)
        model = exp / args.inference_asr_model
        if not model.exists():
            raise UserError(f"{model} does not exist: train first (stage 11)")
        search, streaming = _search_configs(layout)
        options = [
            *("--experiment", str(exp)),
            *("--inference_asr_model", args.inference_asr_model),
            *("--wav_scp", str(layout.dump(args.test_sets[0]) / "wav.scp")),
            *("--inference_config", str(search), "--streaming_config", str(streaming)),
            *([] if args.ngpu is None else ["--ngpu", str(min(1, args.ngpu))]),
            *shlex.split(args.profile_args),
        ]
        out = exp / "profile"

        def build(options: list[str] = options, out: Path = out) -> None:
            _profile([*options, "--decoding", layout.inference_name], out)

        inputs = [model.resolve(), exp / "config.yaml", search, streaming]
        once(out, build, [*inputs, layout.dump(args.test_sets[0])], options=options)
        _refresh_scores(exp, layout.inference_name, out / "profile.json")


def _search_configs(layout: Layout) -> tuple[Path, Path]:
    """The decoding options of whole utterances and of streaming."""
    args = layout.args
    if args.use_streaming:
        return DECODE, args.inference_config
    return args.inference_config, DECODE_STREAMING


def _profile(options: list[str], out: Path) -> None:
    """Run the command in a process of its own: nothing else is in its memory then."""
    print(f"  profiling {out.parent.name}, log in {out / 'profile.log'}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "profile.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "espnet_kv.bin.profile", *options]
        ended = subprocess.run(command, stderr=log, check=False)
    if ended.returncode:
        raise UserError(
            f"{out.parent.name} was not profiled: {last_error(out / 'profile.log')} "
            f"(whole log: {out / 'profile.log'})"
        )


def _refresh_scores(exp: Path, decoding: str, file: Path) -> None:
    """Bring the error rates in a profile up to date."""
    profile = json.loads(file.read_text(encoding="utf-8"))
    # a decoding that was preferred before stays so, for the other kind
    named = {row["decoding"] for kind in profile["wer"].values() for row in kind.values()}
    wer = read_scores(exp, [decoding, *sorted(named)])
    if wer != profile["wer"]:
        write_text(file, json.dumps(profile | {"wer": wer}, indent=1) + "\n")
