"""Machines that fail in the middle of the recipe: killed runs, full disks, read-only folders."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from small_recipe import leftovers, make_recipe, results, run, said, start

from espnet_kv.files import locked
from espnet_kv.recipe import train

STAGES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13)
WITH_LM = ("--use_lm", "true", "--lm_config", "lm.yaml")


@pytest.fixture(scope="module", autouse=True)
def _several_parts():
    """Statistics are made in parts of 5 utterances, as those of a large corpus are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PART", 5)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, list[str], str]:
    """A folder after stages 1 to 13, the options of that run, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = [*make_recipe(folder), *WITH_LM]
    code, out, err = run(folder, *options, "--stop_stage", "13")
    assert code == 0, out + err
    return folder, options, out


def test_every_run_ends_with_what_became_of_the_utterances(undisturbed):
    folder, _, out = undisturbed
    train, dev, test = out.splitlines()[-4:-1]
    assert train.split() == ["train_sp", "12", "0", "12", "0.00", "4", "12"]
    assert dev.split() == ["dev", "3", "0", "3", "0.00", "2", "3"]
    assert test.split() == ["test", "3", "0", "3", "0.00", "2", "3", "3"]
    assert "|train_sp|12|0|12|0.00|4|12|||" in (folder / "exp/RESULTS.md").read_text()
    assert leftovers(folder) == []


def test_a_second_run_does_nothing(undisturbed):
    folder, options, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    code, out, _ = run(folder, *options, "--stop_stage", "13")
    assert code == 0 and out.count("is up to date") == 15
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"RESULTS.md", ".results.done.json"}


@pytest.mark.slow
def test_a_run_killed_in_each_stage_ends_as_one_that_never_was(undisturbed, tmp_path):
    options = [*make_recipe(tmp_path), *WITH_LM]
    for stage in STAGES:
        kill_and_run_again(tmp_path, *options, "--stage", str(stage), "--stop_stage", str(stage))
    assert leftovers(tmp_path) == []
    assert results(tmp_path) == results(undisturbed[0])


def kill_and_run_again(folder: Path, *options: str) -> None:
    """Kill -9 a run as soon as a step of it is at work, and run it again to its end."""
    victim = start(folder, *options)
    while victim.poll() is None and not leftovers(folder):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    code, out, err = run(folder, *options)
    assert code == 0, out + err


@pytest.mark.parametrize("nj", ["2", "32"])
def test_the_number_of_jobs_changes_nothing(undisturbed, tmp_path, nj):
    """32 jobs are more than there are utterances in any set; statistics are of several parts."""
    folder, options, _ = undisturbed
    # processes that read audio take seconds to begin: with 32 jobs the statistics alone
    stage = "1" if nj == "2" else "10"
    if stage == "10":
        shutil.copytree(folder / "exp", tmp_path / "exp", symlinks=True)
        shutil.rmtree(next((tmp_path / "exp").glob("asr_stats*/")))
        places = ["--expdir", str(tmp_path / "exp")]
    else:
        places = [f"--{name}dir={tmp_path / name}" for name in ("exp", "data", "dump")]
    code, out, err = run(
        folder,
        *options,
        *places,
        *("--use_lm", "false", "--nj", nj, "--stage", stage, "--stop_stage", "10"),
    )
    assert code == 0, out + err
    found, wanted = results(tmp_path), results(folder)
    same = [name for name in wanted if name.startswith(("exp/asr_stats", "dump"))]
    for name in same if stage == "1" else [name for name in same if name.startswith("exp")]:
        assert found[name] == wanted[name], name
    stats = [
        dict(np.load(next(root.glob("exp/asr_stats*/train/feats_stats.npz"))))
        for root in (tmp_path, folder)
    ]
    assert stats[0].keys() == stats[1].keys()
    for key, value in stats[0].items():
        np.testing.assert_allclose(value, stats[1][key], rtol=1e-6)


class TestLostProducts:
    """What is gone or damaged is made again, and what was made of it as well only if it changed."""

    @pytest.mark.parametrize(
        ("lost", "stage"),
        [
            ("exp/asr_stats*/train/feats_stats.npz", 10),
            ("exp/asr_stats*/valid/speech_shape", 10),
            ("dump/raw/test/data_wav.1.ark", 3),
            ("data/en_token_list/char/tokens.txt", 5),
            ("exp/asr_train*/decode_*/test/text", 12),
            ("exp/asr_train*/decode_*/test/score_wer/result.txt", 13),
            ("exp/asr_train*/decode_*/test/scores.json", 13),
            ("exp/asr_train*/valid.acc.ave.pth", 11),
        ],
    )
    def test_are_noticed(self, undisturbed, lost, stage):
        folder, options, _ = undisturbed
        file = next(folder.glob(lost))
        content = file.read_bytes()
        file.unlink()
        code, out, _ = run(folder, *options, "--stop_stage", "13", "--dry_run", "true")
        file.write_bytes(content)
        assert code == 0
        would = [line for line in out.splitlines() if "would run" in line and "always" not in line]
        # what reads the lost file is listed as well
        assert would[0].startswith(f"stage {stage}:") and would[0].endswith("is gone"), would

    def test_an_ark_that_was_cut(self, undisturbed):
        folder, options, _ = undisturbed
        ark = folder / "dump/raw/test/data_wav.1.ark"
        content = ark.read_bytes()
        ark.write_bytes(content[: len(content) // 2])
        only = (*options, "--stage", "3", "--stop_stage", "3")
        code, out, _ = run(folder, *only)
        assert code == 0 and "data_wav.1.ark changed after it was made" in out
        assert ark.read_bytes() == content


def test_a_test_set_that_is_the_validation_set_too_is_decoded_whole(undisturbed, tmp_path):
    """Training leaves out what is too long; scoring does not."""
    folder, options, _ = undisturbed
    wav = next((folder / "own/dev").glob("*.wav"))
    samples, rate = soundfile.read(wav)
    shutil.copytree(folder / "own", tmp_path / "own")
    for scp in (tmp_path / "own").glob("*/wav.scp"):
        scp.write_text(scp.read_text().replace(str(folder), str(tmp_path)))
    soundfile.write(tmp_path / wav.relative_to(folder), np.tile(samples, 3), rate)
    (tmp_path / "conf").symlink_to(folder / "conf")
    shutil.copy(folder / "tiny.yaml", tmp_path)
    both = [
        *options,
        "--use_lm",
        "false",
        "--test_sets",
        "own/dev",
        "--max_wav_duration",
        "1",
        "--stop_stage",
        "12",
    ]
    code, out, err = run(tmp_path, *both)
    assert code == 0, out + err
    assert len((tmp_path / "dump/raw/dev/wav.scp").read_text().splitlines()) == 2
    (decoded,) = tmp_path.glob("exp/asr_train*/decode_*/org/dev/text")
    assert len(decoded.read_text().splitlines()) == 3
    assert out.splitlines()[-2].split()[:3] == ["dev", "3", "0"]


@pytest.mark.parametrize("harm", ["missing", "cut", "no transcript"])
def test_a_test_set_never_loses_an_utterance(undisturbed, tmp_path, harm):
    folder, options, _ = undisturbed
    shutil.copytree(folder / "own/test", tmp_path / "test")
    wav = tmp_path / "test/test1.wav"
    scp = tmp_path / "test/wav.scp"
    scp.write_text(scp.read_text().replace(str(folder / "own"), str(tmp_path)))
    if harm == "missing":
        wav.unlink()
    elif harm == "cut":
        wav.write_bytes(wav.read_bytes()[:9000])
    else:
        text = tmp_path / "test/text"
        text.write_text("".join(text.read_text().splitlines(True)[::2]))
    places = [f"--{name}dir={tmp_path / name}" for name in ("exp", "data", "dump")]
    line = said(
        run(folder, *options, *places, "--test_sets", str(tmp_path / "test"), "--stop_stage", "3")
    )
    assert "test1" in line
    assert not (tmp_path / "dump/raw/test").exists()


def test_two_runs_at_once(undisturbed, tmp_path):
    folder, options, _ = undisturbed
    with locked(tmp_path / "dump/raw/test", "./run.sh --corpus kaldi"):
        outcome = run(
            folder, *options, "--dumpdir", str(tmp_path / "dump"), "--stage", "3", "--stop_stage=3"
        )
    assert f"process {os.getpid()}" in said(outcome)
    assert not list(tmp_path.glob("dump/raw/*/*"))


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system of its own at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("place", "stage", "size"),
    [("dump", 3, "40k"), ("data", 2, "40k"), ("exp", 10, "8k"), ("exp", 11, "60k")],
)
def test_a_full_disk(undisturbed, tmp_path, place, stage, size):
    folder, options, _ = undisturbed
    mine = tmp_path / place
    with mounted(mine, f"size={size}"):
        places = [f"--{place}dir", str(mine)]
        first = "1" if place == "data" else "10" if place == "exp" else str(stage)
        only = (*options, *places, "--stage", first, "--stop_stage", str(stage))
        line = said(run(folder, *only))
        assert "No space left" in line or "space" in line, line
        subprocess.run(["mount", "-o", "remount,size=20m", str(mine)], check=True)
        code, out, err = run(folder, *only)
        assert code == 0, out + err
        assert leftovers(mine) == []


@pytest.mark.parametrize(("place", "stage"), [("dump", 3), ("data", 1), ("exp", 10)])
def test_a_folder_that_cannot_be_written(undisturbed, tmp_path, place, stage):
    folder, options, _ = undisturbed
    mine = tmp_path / place
    with mounted(mine, "ro"):
        only = (f"--{place}dir", str(mine), "--stage", str(stage), "--stop_stage", str(stage))
        line = said(run(folder, *options, *only))
        assert str(mine) in line and "Read-only" in line
