"""The options with which ESPnet's asr.sh makes what our driver would make, under the same names."""

import argparse
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError
from espnet_kv.files import write_text
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.train import default_gpus

AS_GIVEN = (
    *("nj", "inference_nj", "gpu_inference", "dumpdir", "expdir", "audio_format", "fs"),
    *(
        "token_type",
        "cleaner",
        "nbpe",
        "bpemode",
        "bpe_char_cover",
        "lang",
        "train_set",
        "valid_set",
    ),
    *("use_lm", "lm_config", "lm_args", "inference_lm", "use_ngram", "ngram_num"),
    *("asr_args", "feats_normalize", "inference_asr_model"),
    *("use_streaming", "inference_config", "inference_args"),
)
"""Options of both drivers that asr.sh gets as our driver has them."""
SPLIT = {"python", "local_data_opts", "speed_perturb_factors", "test_sets"}
SPLIT |= {"asr_args", "lm_args", "inference_args"}
"""Options of several words; asr.sh, which does not quote, splits others at spaces, too."""
UNFIT = r"""[*?"'`$\\;&|<>]"""
"""Characters by which asr.sh, whose options go through eval, means something else."""


def asr_sh_call(
    layout: Layout, config: Path, first: int, last: int, more: Mapping[str, str]
) -> list[str]:
    """One call, of asr.sh's stages from `first` to `last` for one training configuration."""
    options = {"stage": first, "stop_stage": last, **_values(layout, config), **more}
    return ["./asr.sh", *(str(w) for name, value in options.items() for w in (f"--{name}", value))]


def _values(layout: Layout, config: Path) -> dict[str, Any]:
    """Option of asr.sh -> its value for one training configuration."""
    args = layout.args
    train, valid = layout.dump(layout.train_set), layout.dump(args.valid_set)
    transcripts = f"data/{args.train_set}/text"
    low = max(args.min_wav_duration, layout.shortest_seconds)
    values = {
        "python": f"{python()} -m espnet_kv",
        "local_data_opts": _stage_1(args),
        "ngpu": default_gpus(args.ngpu),
        "speed_perturb_factors": " ".join(map(str, args.speed_perturb_factors))
        if layout.perturbed
        else "",
        # asr.sh drops what has just so many samples, too
        "min_wav_duration": (math.ceil(low * args.fs) - 0.5) / args.fs,
        "max_wav_duration": (math.floor(args.max_wav_duration * args.fs) + 1.5) / args.fs,
        "asr_config": _with_overlay(layout, config),
        "asr_exp": layout.asr_exp(config),
        "asr_stats_dir": layout.stats(config),
        "lm_exp": layout.lm_exp,
        "lm_stats_dir": layout.lm_stats,
        "ngram_exp": layout.ngram.parent,
        "inference_ngram": layout.ngram.name,
        "inference_tag": layout.inference_name,
        # asr.sh's own default goes before that of the configuration
        "batch_size": load_yaml(args.inference_config).get("batch_size", 1),
        "test_sets": " ".join(args.test_sets),
        "bpe_train_text": transcripts,
        # the token list of characters is made of the first one, too
        "lm_train_text": transcripts if args.token_type == "char" else train / "text",
        "lm_dev_text": valid / "text",
    }
    for name in AS_GIVEN:
        value = getattr(args, name)
        values[name] = str(value).lower() if isinstance(value, bool) else value
    for name, value in values.items():
        unfit = UNFIT if name in SPLIT else rf"{UNFIT}|\s"
        if found := re.search(unfit, str(value)):
            raise UserError(f"--{name} {value}: asr.sh cannot take {found[0]!r} in it")
    return values


def python() -> str:
    """What asr.sh, which splits it at spaces, calls this Python."""
    return "python3" if re.search(r"\s", sys.executable) else sys.executable


def _stage_1(args: argparse.Namespace) -> str:
    """Options of local/data.sh; a copy of the corpus is named in the environment."""
    if args.corpus_dir is not None:
        os.environ["LIBRISPEECH"] = str(args.corpus_dir.absolute())
    return f"--nj {args.nj} --download_dir {args.download_dir}"


def _with_overlay(layout: Layout, config: Path) -> Path:
    if not layout.laid_over:
        return config
    file = layout.args.expdir / "configs" / f"{config.stem}{layout.laid_over}.yaml"
    text = yaml.safe_dump(layout.model_config(config), sort_keys=False, allow_unicode=True)
    if not layout.args.dry_run:
        write_text(file, text)
    return file
