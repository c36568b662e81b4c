"""A recipe that runs in seconds: noise in Kaldi data directories, and a tiny model."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import yaml
from synth_recipe import REPO, TINY

from espnet_kv.recipe.__main__ import main

RATE = 16000
WORDS = ("ONE", "TWO", "THREE", "FOUR")
OVERLAY = TINY | {
    "encoder_conf": {"output_size": 8, "attention_heads": 2, "num_blocks": 1, "linear_units": 8},
    "decoder_conf": {"attention_heads": 2, "linear_units": 8, "num_blocks": 1},
    "max_epoch": 1,
    "keep_nbest_models": 1,
    "use_tensorboard": False,
}
LM = {
    "max_epoch": 1,
    "num_workers": 0,
    "use_tensorboard": False,
    "lm_conf": {"unit": 4, "layer": 1, "head": 2, "embed_unit": 4, "att_unit": 4},
}
COUNTS = {"train": 6, "dev": 3, "test": 3}


def write_data(folder: Path, name: str, count: int, seconds: float = 0.6) -> Path:
    """A Kaldi data directory of `count` utterances of noise, with absolute paths."""
    data = folder / name
    data.mkdir(parents=True)
    lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": []}
    for n in range(count):
        rng = np.random.default_rng([count, n])
        utt = f"{name}{n}"
        wav = data / f"{utt}.wav"
        soundfile.write(wav, 0.1 * rng.standard_normal(int(RATE * seconds)), RATE)
        lines["wav.scp"].append(f"{utt} {wav}\n")
        lines["text"].append(f"{utt} {' '.join(WORDS[(n + k) % 4] for k in range(1 + n % 3))}\n")
        lines["utt2spk"].append(f"{utt} speaker{n % 2}\n")
    for file, content in lines.items():
        (data / file).write_text("".join(content))
    return data


def make_recipe(folder: Path) -> list[str]:
    """Write data to `folder`/own and an overlay; return the options of a run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "conf").symlink_to(REPO / "conf")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(OVERLAY))
    lm = yaml.safe_load((REPO / "conf/train_lm_small.yaml").read_text())
    (folder / "lm.yaml").write_text(yaml.safe_dump(lm | LM))
    for name, count in COUNTS.items():
        write_data(folder / "own", name, count)
    return [
        *("--corpus", "kaldi", "--train_set", "own/train", "--valid_set", "own/dev"),
        *("--test_sets", "own/test", "--token_type", "char", "--nj", "1", "--inference_nj", "1"),
        *("--speed_perturb_factors", "1.0 1.1", "--overlay", "tiny.yaml", "--ngpu", "0"),
        *("--inference_config", "conf/decode_asr_fast.yaml", "--inference_args", "--beam_size 1"),
    ]


def start(folder: Path, *options: str) -> subprocess.Popen:
    """Start the driver in `folder`, in a new process group."""
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "espnet_kv.recipe", *options],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(folder: Path, *options: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the driver, run in this process.

    Its jobs are processes; those of one test session share the server that has loaded ESPnet.
    """
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(folder), streams[0], streams[1]:
        code = main(list(options))
    return code, out.getvalue(), err.getvalue()


def said(outcome: tuple[int, str, str]) -> str:
    """The single error line of a failed run."""
    code, _, err = outcome
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def results(folder: Path) -> dict[str, bytes]:
    """Output of a run without dates and paths: data, tokens, keys, hypotheses."""
    kept = {}
    for pattern in (
        "dump/raw/**/text",
        "dump/raw/**/utt2num_samples",
        "dump/raw/**/data_wav.*.ark",
        "data/en_token_list/**/tokens.txt",
        "exp/*_stats_*/*/*_shape*",
        "exp/asr_*/decode_*/*/text",
        "exp/asr_*/decode_*/*/score_wer/result.txt",
        "exp/asr_*/decode_*/*/scores.json",
    ):
        for path in sorted(folder.glob(pattern)):
            kept[str(path.relative_to(folder))] = path.read_bytes()
    return kept


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks, which a successful run must remove."""
    marks = (".partial", ".parts", ".lock", "begun")
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if any(mark in path.name for mark in marks)
    )
