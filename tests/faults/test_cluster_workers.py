"""Dask workers that are killed, that never come, and what is left of a run that was ended."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import process_stubs
import psutil
import pytest
import yaml
from small_recipe import leftovers, run, said
from tone_recipe import make_tone_recipe, outputs

from espnet_kv.bin import asr_inference
from espnet_kv.errors import UserError
from espnet_kv.recipe import cluster, cluster_config
from espnet_kv.recipe.decode import RESULT_FILES
from espnet_kv.recipe.pool import CLUSTER, parallel_map

REPO = Path(__file__).parents[2]
ONE = {"n_workers": 1, "threads_per_worker": 1}
TWO = ONE | {"n_workers": 2}
STAGE_3 = ("--stage", "3", "--stop_stage", "3", "--allow_pipes", "true")
STAGE_12 = ("--stage", "12", "--stop_stage", "12", "--inference_nj", "1")
# what sbatch does, without a scheduler: the job's processes are one group, whose leader is its id
SBATCH = """#!/bin/sh
cp "$1" job.sh
setsid sh job.sh >>jobs.log 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
kill -9 "-$1"
"""


@contextlib.contextmanager
def on(kind: str, folder: Path, **options) -> Iterator[None]:
    """Within it work goes to a cluster of these options."""
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(options))
    made = cluster.Cluster(cluster_config.read(kind, file), folder)
    with cluster.opened(made), cluster.used_in(3, made):
        yield


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands in the place of Slurm's; a configuration for them."""
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{REPO}:{Path(process_stubs.__file__).parent}")
    return {"cores": 1, "memory": "2GB", "n_workers": 1, "wait": 60}


def test_stage_3_with_a_worker_that_is_killed_in_its_middle(tmp_path):
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    for folder in (undisturbed, disturbed):
        options = make_tone_recipe(folder, 24)
        # the first worker that reads the tenth utterance is killed by that
        lines = (folder / "own/test/wav.scp").read_text().splitlines()
        utt, file = lines[10].split()
        kill = f"[ -e {folder}/killed ] || {{ touch {folder}/killed; kill -9 $PPID; }}"
        lines[10] = f"{utt} {kill}; cat {file} |"
        (folder / "own/test/wav.scp").write_text("".join(f"{line}\n" for line in lines))
        if folder == undisturbed:
            (folder / "killed").touch()
        assert run(folder, *options, "--stop_stage", "1", "--allow_pipes", "true")[0] == 0
    assert run(undisturbed, *options, *STAGE_3)[0] == 0
    (disturbed / "local.yaml").write_text(yaml.safe_dump(TWO))
    where = ("--cluster", "local", "--cluster_config", "local.yaml")
    code, out, err = run(disturbed, *options, *STAGE_3, *where)
    assert code == 0, err
    assert (disturbed / "killed").exists() and "error" not in err
    assert "cluster: local, local.yaml" in out and "test   24  0          24" in out
    assert outputs(disturbed) == outputs(undisturbed) and leftovers(disturbed) == []


@pytest.mark.slow
def test_stage_12_with_a_worker_that_is_killed_in_its_middle(tmp_path):
    options = make_tone_recipe(tmp_path, 12)
    assert run(tmp_path, *options, "--stop_stage", "3")[0] == 0
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(TWO))
    killed: list[int] = []
    killer = threading.Thread(target=kill_the_worker_at, args=(tmp_path, killed))
    killer.start()
    where = ("--cluster", "local", "--cluster_config", "local.yaml")
    code, out, err = run(tmp_path, *options, *STAGE_12, *where)
    killer.join()
    assert code == 0 and killed, out + err
    assert "asr_x test 1/1: done (1/1)" in out and leftovers(tmp_path) == []
    (decoded,) = tmp_path.glob("exp/asr_x/decode_*/test")
    log = (decoded / "logdir/asr_inference.1.log").read_text()
    assert "started again: espnet_kv.bin.asr_inference" in log
    decode_here(tmp_path, decoded / "logdir/decode.yaml", tmp_path / "undisturbed")
    for file in RESULT_FILES:
        undisturbed = (tmp_path / "undisturbed/1best_recog" / file).read_text()
        assert (decoded / file).read_text() == undisturbed and undisturbed.count("\n") == 12


def decode_here(folder: Path, config: Path, out: Path) -> None:
    """What the job of stage 12 does, in this process."""
    with contextlib.chdir(folder):
        asr_inference.main(
            [
                f"--config={config}",
                "--asr_train_config=exp/asr_x/config.yaml",
                "--asr_model_file=exp/asr_x/valid.acc.ave.pth",
                "--data_path_and_name_and_type=dump/raw/test/wav.scp,speech,kaldi_ark",
                *("--ctc_weight", "0.95", "--beam_size", "2", f"--output_dir={out}"),
            ]
        )


def kill_the_worker_at(folder: Path, killed: list[int]) -> None:
    """Kill -9 the worker that decodes the first part, as soon as that writes its output."""
    end = time.monotonic() + 300
    pattern = "exp/asr_x/decode_*/test/logdir/.output.1.partial-*/1best_recog/text"
    while not list(folder.glob(pattern)) and time.monotonic() < end:
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("keys.1.scp" in word for word in process.cmdline()):
                killed.append(process.ppid())
                os.kill(process.ppid(), signal.SIGKILL)
                return


class TestNoWorkers:
    def test_a_part_that_kills_every_worker_is_given_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cluster, "LOST", 1)
        told = r"^--cluster local: 2 workers were lost at one part, most likely for lack of memory"
        with on("local", tmp_path, **ONE), pytest.raises(UserError, match=told):
            list(parallel_map(process_stubs.kill_at_three, range(40), 2))

    def test_no_worker_comes(self, tmp_path, slurm):
        (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
        told = (
            r"^--cluster slurm: there has been no worker for 1 s: .* raise wait in \S+slurm\.yaml$"
        )
        with on("slurm", tmp_path, **slurm | {"wait": 1}), pytest.raises(UserError, match=told):
            list(parallel_map(process_stubs.square, range(40), 2))

    def test_the_scheduler_refuses_the_jobs(self, tmp_path, slurm, capfd):
        (tmp_path / "sbatch").write_text("#!/bin/sh\necho invalid partition: main >&2\nexit 1\n")
        told = r"slurm\.yaml: the scheduler refused a job: invalid partition: main$"
        with on("slurm", tmp_path, **slurm), pytest.raises(UserError, match=told):
            list(parallel_map(process_stubs.square, range(40), 2))
        assert "Traceback" not in capfd.readouterr().err

    def test_a_job_of_a_scheduler_works_until_it_is_cancelled(self, tmp_path, slurm):
        """Its machine is gone: nothing starts another worker."""
        with on("slurm", tmp_path, **slurm):
            numbers = range(40)
            assert list(parallel_map(process_stubs.square, numbers, 2)) == [n * n for n in numbers]
            made = CLUSTER.get()
            (job,) = made._cluster.workers.values()
            subprocess.run(["scancel", job.job_id], check=True)
            made._options = replace(made._options, wait=1)
            with pytest.raises(UserError, match="there has been no worker for 1 s"):
                list(parallel_map(process_stubs.square, numbers, 2))


RUN = f"""
import signal
from pathlib import Path
import {process_stubs.__name__}
from espnet_kv.recipe import cluster, jobs, pool
def work():
    job = jobs.Job("job", {process_stubs.__name__!r}, ["family", "a.json"], Path("a.log"))
    jobs.run_jobs([job], 1)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    made = cluster.read({{"cluster": "local", "cluster_config": Path("local.yaml")}})
    with pool.terminate_on_signals(), cluster.opened(made), cluster.used_in(12, made):
        work()
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_nothing_is_left_of_a_run_that_was_ended(number, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(ONE))
    stubs = Path(process_stubs.__file__).parent
    process = subprocess.Popen(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{stubs}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started: list[psutil.Process] = []
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "a.json").exists() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 3  # the worker, the job and its child
        if number == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            process.kill()
        _, err = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(started, timeout=30)
        assert not alive
    finally:
        for each in started:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.kill()
    if number == "SIGINT":
        assert process.returncode == 128 + signal.SIGINT
        assert err == "error: stopped by SIGINT: the same command goes on from here\n"


def test_the_recipe_tells_what_is_wrong_with_its_cluster_in_one_line(tmp_path):
    options = make_tone_recipe(tmp_path, 2)
    (tmp_path / "slurm.yaml").write_text("n_workers: 2\ncors: 4\n")
    where = ("--cluster", "slurm", "--cluster_config", "slurm.yaml")
    told = said(run(tmp_path, *options, *where))
    assert told == ("error: slurm.yaml: cors: unknown key of --cluster slurm (see docs/cluster.md)")
    assert not (tmp_path / "dump").exists()
