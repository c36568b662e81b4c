"""On a GPU: the recipe trains, decodes and profiles there, each job in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from devices import device_or_skip
from synth_recipe import RECIPE, REPO, SIZES, TINY

DEVICE = device_or_skip()
pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ON_GPU = DEVICE.type == "cuda"
DEVICES = ("--ngpu", "1", "--gpu_inference", "true") if ON_GPU else ("--ngpu", "0")
MODELS = ("mha", "linear")
OPTIONS = (
    *("--corpus", "synth", *SIZES, "--overlay", "tiny.yaml", "--speed_perturb_factors", ""),
    *("--use_lm", "true", "--lm_config", "tiny_lm.yaml", "--train_nj", "2", "--inference_nj", "2"),
    *("--asr_config", " ".join(f"conf/train_asr_conformer_{model}.yaml" for model in MODELS)),
    *("--profile_args", "--lengths '2 6' --utterances 2 --repeats 1"),
    *DEVICES,
)


def run(asr1: Path, *options: str) -> str:
    """Standard output of run.sh, which ends well."""
    ended = subprocess.run(
        ["./run.sh", *OPTIONS, *options],
        cwd=asr1,
        env=os.environ | {"python": sys.executable, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The recipe after stages 1 to 14, and what stages 10 to 14 printed."""
    asr1 = tmp_path_factory.mktemp("egs2") / "asr1"
    unwanted = shutil.ignore_patterns("conf", "data", "dump", "exp", "demo", "down*")
    shutil.copytree(RECIPE, asr1, ignore=unwanted)
    (asr1 / "conf").symlink_to(REPO / "conf")
    overlay = TINY | {"use_amp": ON_GPU}
    (asr1 / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    text = (REPO / "conf/train_lm_small.yaml").read_text()
    (asr1 / "tiny_lm.yaml").write_text(text.replace("max_epoch: 10", "max_epoch: 1"))
    run(asr1, "--stage", "1", "--stop_stage", "9")
    return asr1, run(asr1, "--stage", "10", "--stop_stage", "14")


def experiments(asr1: Path) -> list[Path]:
    return sorted(asr1.glob("exp/asr_train_asr_conformer_*"))


def test_trainings_ran_where_they_should(finished):
    asr1, out = finished
    language_models = [file.parent for file in asr1.glob("exp/lm_*/valid.loss.ave.pth")]
    found = [*experiments(asr1), *language_models]
    assert len(found) == len(MODELS) + 1
    for exp in found:
        config = yaml.safe_load((exp / "config.yaml").read_text())
        assert config["ngpu"] == int(ON_GPU)
        assert "re-initialize CUDA" not in (exp / "train.log").read_text()
    assert out.count("epoch 2/2, train loss") == len(MODELS)


def test_decodings_ran_where_they_should(finished):
    asr1, _ = finished
    for exp in experiments(asr1):
        logs = list(exp.glob("decode_*/*/logdir/*.log"))
        assert len(logs) >= 4
        for log in logs:
            text = log.read_text()
            assert f"device={DEVICE.type}" in text and "Traceback" not in text
    assert "### WER" in (asr1 / "exp/RESULTS.md").read_text()


def test_models_are_profiled(finished):
    asr1, _ = finished
    for exp in experiments(asr1):
        profile = json.loads((exp / "profile/profile.json").read_text())
        assert all(row["chunk_ms"] > 0 for row in profile["time"]["lengths"])


def test_a_rerun_does_nothing_again(finished):
    out = run(finished[0], "--stage", "10", "--stop_stage", "14")
    assert "epoch" not in out and "is up to date" in out
