"""ESPnet checkouts to put the recipe into: one with a stand-in for asr.sh, and the real one."""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).parents[2]
NAME = "librispeech_100_kv"
RECIPE = REPO / "egs2" / NAME / "asr1"
VERSION = metadata.version("espnet")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espnet_kv"
MADE = (
    *("data", "dump", "exp", "demo", "downloads", "asr.sh", "scripts", "pyscripts"),
    *("steps", "utils", "profiles", "report"),
)

# its options are the variables of ESPnet's own that tests give; it prints how it was called
STAND_IN = """#!/usr/bin/env bash
stage=1
stop_stage=10000
skip_stages=
skip_packing=true
skip_eval=false
hf_repo=
python=python3
inference_ngram=
pretrained_model=
local_data_opts=
use_word_lm=false
help_message=x
not_an_option=1
printf '%s\\n' call "$@"
"""


def put_recipe(egs2: Path) -> Path:
    """Copy the recipe's folder as a user does, as git has it; its asr1."""
    ignore = shutil.ignore_patterns(*MADE)
    shutil.copytree(REPO / "egs2" / NAME, egs2 / NAME, symlinks=True, ignore=ignore)
    return egs2 / NAME / "asr1"


def stand_in(folder: Path) -> Path:
    """A checkout as far as run.sh looks, without the recipe; its egs2."""
    template = folder / "egs2/TEMPLATE/asr1"
    for name in ("scripts", "pyscripts", "steps", "utils"):
        (template / name).mkdir(parents=True)
    (template / "asr.sh").write_text(STAND_IN)
    (template / "asr.sh").chmod(0o755)
    for name in ("path.sh", "cmd.sh"):
        (template / name).write_text("")
    (template / "db.sh").write_text("LIBRISPEECH=downloads\n")
    return folder / "egs2"


def real(folder: Path) -> Path:
    """ESPnet's own checkout, as far as recipes use it, from its sdist; its egs2.

    Raises:
        OSError: the sdist is neither in the cache nor to be had.
    """
    sdist = CACHE / f"espnet-{VERSION}.tar.gz"
    if not sdist.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:"]
        pip += ["--no-deps", "--no-build-isolation", f"espnet=={VERSION}", "-d", str(CACHE)]
        ended = subprocess.run(pip, capture_output=True, text=True)
        if ended.returncode or not sdist.exists():
            raise OSError(f"no sdist of ESPnet: {ended.stderr.strip().splitlines()[-1:]}")
    root = f"espnet-{VERSION}"
    wanted = (f"{root}/egs2/TEMPLATE/asr1/", f"{root}/tools/")
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(folder, members, filter="data")
    return folder / root / "egs2"


def set_up(asr1: Path) -> None:
    """Apply ESPnet's setup.sh, as its documentation has it."""
    template = asr1.parents[1] / "TEMPLATE/asr1"
    setup = ["./setup.sh", f"../../{NAME}/asr1"]
    subprocess.run(setup, cwd=template, check=True, capture_output=True)


def run(asr1: Path, *options: str, script: str = "run.sh", **env: str):
    """run.sh, called in a shell that has gone to `asr1` by that name."""
    known = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    known |= {"python": sys.executable, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    call = 'cd "$1" && script=$2 && shift 2 && exec "./${script}" "$@"'
    return subprocess.run(
        ["bash", "-c", call, "bash", str(asr1), script, *options],
        env=known | env,
        capture_output=True,
        text=True,
    )


def calls(output: str) -> list[dict[str, str]]:
    """The options of every call of the stand-in."""
    found: list[list[str]] = []
    for line in output.splitlines():
        if line == "call":
            found.append([])
        elif found:
            found[-1].append(line)
    return [dict(zip(words[::2], words[1::2], strict=False)) for words in found]
