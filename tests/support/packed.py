"""A trained model as the recipe leaves it, and its pack."""

import json
from pathlib import Path
from typing import Any

import soundfile
import yaml
from profile_json import make_profile
from scored import score
from small_models import RATE, config, save, speech

from espnet_kv.recipe.archive import pack

NAME = "asr_x"
BEST = "valid.acc.ave.pth"


def experiment(recipe: Path, **changes: Any) -> Path:
    """recipe/exp/asr_x: a recognizer of tones whose config names files relative to `recipe`."""
    exp, stats = recipe / "exp" / NAME, recipe / "exp/asr_stats/train"
    for folder in (exp, stats):
        folder.mkdir(parents=True)
    save(exp, **changes)
    (exp / "model.pth").rename(exp / BEST)
    (exp / "feats_stats.npz").rename(stats / "feats_stats.npz")
    conf = config(recipe, **changes) | {
        "normalize_conf": {"stats_file": "exp/asr_stats/train/feats_stats.npz"}
    }
    (recipe / "feats_stats.npz").unlink()
    (exp / "config.yaml").write_text(yaml.safe_dump(conf, sort_keys=False))
    run = {"command": "./run.sh --asr_config x", "config": "x.yaml", "commit": "0123abc"}
    (exp / "run.json").write_text(json.dumps(run))
    return exp


def measured(exp: Path) -> None:
    """What stages 13 and 14 leave."""
    score(exp / "decode_asr_asr_model_valid.acc.ave/test_clean", 5.5)
    score(exp / "decode_asr_streaming_asr_model_valid.acc.ave/test_clean", 6.5, streaming=True)
    (exp / "profile").mkdir()
    (exp / "profile/profile.json").write_text(json.dumps(make_profile("conformer", "mla")))


def packed(folder: Path, **changes: Any) -> Path:
    """folder/x.zip, of an experiment that is nowhere."""
    import contextlib
    import shutil

    recipe = folder / "recipe"
    experiment(recipe, **changes)
    with contextlib.chdir(recipe):
        files = {
            "asr_train_config": Path("exp", NAME, "config.yaml"),
            "asr_model_file": Path("exp", NAME, BEST),
        }
        pack(files, [], recipe / "files", folder / "x.zip")
    shutil.rmtree(recipe)
    return folder / "x.zip"


def recording(folder: Path, letters: str = "ABBA") -> Path:
    """folder/speech.wav, in which these tones follow each other."""
    file = folder / "speech.wav"
    soundfile.write(file, speech(letters).numpy(), RATE)
    return file
