"""Jobs of the recipe: their GPUs, their logs, and what is said when one fails."""

import json
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import process_stubs
import pytest

from espnet_kv.errors import UserError
from espnet_kv.recipe import job as job_module
from espnet_kv.recipe import jobs
from espnet_kv.recipe.jobs import Job, check_gpus, run_jobs, visible_gpus
from espnet_kv.recipe.logs import parse_epoch

REPO = Path(__file__).parents[2]
STUBS = process_stubs.__name__


@pytest.fixture(autouse=True, scope="module")
def _own_server():
    """A server that has loaded ESPnet is not used here, nor that of these tests in others."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.fixture(autouse=True)
def light_server(monkeypatch):
    """The server of these tests loads nothing, and fresh processes find the stubs."""
    monkeypatch.setattr(job_module, "PRELOAD", [])
    path = f"{REPO}{os.pathsep}{REPO / 'tests/support'}"
    monkeypatch.setenv("PYTHONPATH", path)


def stub(tmp_path: Path, *arguments: object, name: str = "asr_x", **options) -> Job:
    return Job(name, STUBS, [str(a) for a in arguments], tmp_path / f"{name}.log", **options)


def failure(tmp_path: Path, *arguments: object, **options) -> str:
    with pytest.raises(UserError) as caught:
        run_jobs([stub(tmp_path, *arguments, **options)], 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "threads"),
    [(None, 4), ("", 4), ("many", 4), ("1", 1), ("3,2", 3), ("16", 4), ("0", 1)],
)
def test_the_threads_of_a_job_are_its_share_of_the_cores_or_fewer(
    tmp_path, monkeypatch, given, threads
):
    monkeypatch.setattr(jobs, "cores", lambda: 8)
    monkeypatch.setattr(jobs, "most_at_once", lambda: 2)
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    started = []
    monkeypatch.setattr(
        jobs.Running, "start", lambda job, devices, threads: started.append(threads) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run_jobs([stub(tmp_path, name="a"), stub(tmp_path, name="b")], 2)
    assert started == [threads]


class TestGPUs:
    def records(self, tmp_path: Path, count: int, parallel: int, **options) -> list[dict]:
        files = [tmp_path / f"{n}.json" for n in range(count)]
        run_jobs(
            [stub(tmp_path, "record", f, 0.3, name=f.stem, **options) for f in files], parallel
        )
        return [json.loads(file.read_text()) for file in files]

    def test_trainings_side_by_side_get_a_gpu_each_in_fresh_processes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jobs, "visible_gpus", lambda: 2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-abc,7")
        found = self.records(tmp_path, 4, parallel=4, gpus=1)
        assert {one["gpus"] for one in found} == {"5", "GPU-abc"}  # the third is not there
        for one in found:
            assert one["gpus_at_import"] == one["gpus"]  # before anything could wake CUDA
            assert one["parent"] == os.getpid() and not one["forked"]
            assert one["group"] == one["pid"]
        for device in ("5", "GPU-abc"):
            times = sorted(one["time"] for one in found if one["gpus"] == device)
            assert times[0][1] <= times[1][0]

    def test_jobs_that_share_are_spread_over_the_gpus(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jobs, "visible_gpus", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        files = [tmp_path / f"{n}.met" for n in range(4)]
        meet = [stub(tmp_path, "meet", f, 4, name=f.stem, gpus=1, shares=True) for f in files]
        run_jobs(meet, parallel=4)
        assert sorted(file.read_text() for file in files) == ["0", "0", "1", "1"]

    def test_a_job_for_all_gpus_waits_for_those_before(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jobs, "visible_gpus", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        files = [tmp_path / "one.json", tmp_path / "both.json"]
        run_jobs(
            [
                stub(tmp_path, "record", file, 0.3, name=file.stem, gpus=n)
                for n, file in enumerate(files, start=1)
            ],
            2,
        )
        one, both = (json.loads(file.read_text()) for file in files)
        assert one["gpus"] in ("0", "1") and sorted(both["gpus"].split(",")) == ["0", "1"]
        assert one["time"][1] <= both["time"][0]

    def test_jobs_on_the_cpu_see_no_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        (found,) = self.records(tmp_path, 1, parallel=1)
        assert found["gpus"] == "" and found["forked"] and found["group"] == found["pid"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"

    def test_espnet_is_loaded_by_a_server_that_sees_no_gpu_and_not_by_the_run(self, tmp_path):
        """An ESPnet that wakes a fake device when it is imported with a GPU in sight."""
        fake = tmp_path / "espnet2/bin/asr_inference.py"
        fake.parent.mkdir(parents=True)
        for folder in fake.parents[:2]:
            (folder / "__init__.py").touch()
        fake.write_text("import os\nAWAKE = os.environ.get('CUDA_VISIBLE_DEVICES') != ''\n")
        code = f"""
import sys
from pathlib import Path
from espnet_kv.recipe import job, jobs
del job.PRELOAD[1:]
for name in "12":
    jobs.run_jobs([jobs.Job("cpu", {STUBS!r}, ["record", name], Path("log"))], 1)
assert not [name for name in sys.modules if name.split(".")[0] in ("espnet2", "torch")]
"""
        path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": path},
            check=True,
            timeout=400,
        )
        first, second = (json.loads((tmp_path / name).read_text()) for name in "12")
        assert first["espnet"] and first["device_awake"] is False
        assert first["parent"] == second["parent"] != os.getpid()  # one server for all jobs

    def test_without_a_server_jobs_are_fresh_processes(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError("no sockets here")

        monkeypatch.setattr(job_module.multiprocessing.forkserver, "ensure_running", refuse)
        (found,) = self.records(tmp_path, 1, parallel=1)
        assert not found["forked"] and found["gpus"] == ""

    def test_a_measured_job_starts_with_nothing_loaded(self, tmp_path):
        (found,) = self.records(tmp_path, 1, parallel=1, fresh=True)
        assert not found["forked"] and found["gpus"] == ""

    @pytest.mark.parametrize(
        ("ngpu", "there", "said"),
        [
            (1, 0, "--ngpu 1: torch finds no GPU here.*give --ngpu 0"),
            (2, 1, "--ngpu 2: torch finds 1 GPU here.*give --ngpu 1"),
            (-1, 4, "--ngpu -1: a number of GPUs is 0 or more"),
        ],
    )
    def test_more_gpus_than_there_are(self, ngpu, there, said, monkeypatch):
        monkeypatch.setattr(jobs, "visible_gpus", lambda: there)
        with pytest.raises(UserError, match=said):
            check_gpus(ngpu, "--ngpu")

    def test_hidden_gpus_are_said_to_be_hidden(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert visible_gpus() == 0
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES is ''"):
            check_gpus(1, "--ngpu")
        check_gpus(0, "--ngpu")

    @pytest.mark.parametrize(
        ("ended", "said"),
        [
            (
                subprocess.CompletedProcess([], 1, "", "Traceback\nOSError: no libcuda\n"),
                "no libcuda",
            ),
            (subprocess.TimeoutExpired(["python"], 120), "timed out after 120 seconds"),
        ],
        ids=["broken", "hanging"],
    )
    def test_gpus_that_cannot_be_counted_are_said(self, ended, said, monkeypatch, capsys):
        def run(*_, **__):
            if isinstance(ended, Exception):
                raise ended
            return ended

        monkeypatch.setattr(jobs.glob, "glob", lambda pattern: ["/dev/nvidia0"])
        monkeypatch.setattr(jobs.subprocess, "run", run)
        jobs._count_gpus.cache_clear()
        assert jobs._count_gpus("0") == 0
        jobs._count_gpus.cache_clear()
        message = capsys.readouterr().err
        assert message.startswith("warning: GPUs cannot be counted, none is used: ")
        assert said in message and message.count("\n") == 1

    def test_a_job_for_a_gpu_that_is_not_there_does_not_start(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert "ngpu 1: torch finds no GPU" in failure(tmp_path, "say", "x", gpus=1)
        assert not (tmp_path / "asr_x.log").exists()


class TestReasons:
    @pytest.mark.parametrize("fresh", [False, True], ids=["fork", "fresh"])
    def test_a_job_killed_for_lack_of_memory(self, tmp_path, fresh):
        said = failure(tmp_path, "die", signal.SIGKILL.value, fresh=fresh)
        assert "killed by signal 9 (SIGKILL), most likely for lack of memory" in said
        assert "batch_bins" in said and "--inference_nj" in said and "asr_x.log" in said

    def test_a_job_that_crashed(self, tmp_path):
        said = failure(tmp_path, "die", signal.SIGSEGV.value)
        assert "killed by signal 11 (SIGSEGV)" in said and "memory" not in said

    def test_an_exception_is_told_and_not_the_last_line(self, tmp_path):
        said = failure(tmp_path, "fail")
        assert "asr_x failed: RuntimeError: size mismatch: weight is (2, 2)" in said

    @pytest.mark.parametrize(
        ("printed", "said"),
        [
            ("error: no file a.wav\nINFO: bye", "no file a.wav"),
            ("usage: x\nlm_train: error: argument --a: invalid int value: 'b'", "argument --a"),
            ("x INFO: 1epoch\nMemory is short\ny INFO: 2epoch", "Memory is short"),
            ("x INFO: 1epoch started", "it printed no error"),
            (
                "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of "
                "memory. Tried 2 GiB\n",
                "OutOfMemoryError: CUDA out of memory.*batch_bins",
            ),
            (
                "-- Process 1 terminated\nTraceback (most recent call last):\n  File x\n"
                "espnet_kv.errors.UserError: the disk is full",
                "failed: the disk is full",
            ),
        ],
    )
    def test_the_line_that_explains(self, printed, said, tmp_path):
        with pytest.raises(UserError, match=said):
            run_jobs([stub(tmp_path, "say", printed, 1)], 1)

    def test_an_assertion_without_a_message_is_told_by_its_code(self, tmp_path):
        assert "failed: AssertionError: assert int(number) < 3 (" in failure(tmp_path, "check", 5)

    def test_what_fails_after_a_job_is_its_failure(self, tmp_path, capsys):
        def refuse():
            raise UserError("the model holds nan")

        good = tmp_path / "good.json"
        with pytest.raises(UserError, match=r"the model holds nan \(1 of 2 jobs failed\)"):
            run_jobs(
                [
                    stub(tmp_path, "say", "fine", after=refuse),
                    stub(tmp_path, "record", good, name="good"),
                ],
                1,
            )
        assert good.exists()
        assert "asr_x: failed (1/2)" in capsys.readouterr().out

    def test_a_log_that_cannot_be_written(self, tmp_path):
        (tmp_path / "asr_x.log").mkdir()
        assert "asr_x.log cannot be written: Is a directory" in failure(tmp_path, "say", "x")


EPOCH = "INFO: {}epoch results: [train] iter_time=1e-4, loss={}, [valid] loss={}, time=1.9 seconds"


class TestEpochs:
    @pytest.mark.parametrize(
        ("line", "shown"),
        [
            (EPOCH.format(1, "1.200e+03", "5.100e-04"), "train loss 1.200e+03, valid loss 5.100e-"),
            (
                "2epoch results: [train] loss_ctc=60.3, loss_att=nan, loss=4.1, [valid] loss_ctc=5,"
                " cer_ctc=0.8, acc=nan, loss=3.9, time=1 hour, 2 minutes and 3 seconds, [att_plot]",
                "train loss 4.1, valid loss 3.9, accuracy nan",
            ),
            (EPOCH.format(3, "-0.25", "1.5"), "train loss -0.25, valid loss 1.5"),
        ],
        ids=["exponents", "parts", "negative"],
    )
    def test_numbers_are_read_whole(self, line, shown):
        epoch = parse_epoch(line)
        assert str(epoch).startswith(shown)
        assert not epoch.not_finite()

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            ([EPOCH.format(2, "nan", "1.5")], "epoch 2: train loss is nan"),
            ([EPOCH.format(2, "1.5", "inf")], "epoch 2: valid loss is inf"),
            (
                [
                    EPOCH.format(2, "1.5", "1.5"),
                    "WARNING: The gradients at all steps are invalid in this epoch. Something "
                    "seems wrong. This training was stopped at 2epoch",
                ],
                "epoch 2: all gradients are inf or nan",
            ),
        ],
        ids=["train", "valid", "gradients"],
    )
    def test_a_training_that_diverged_is_stopped_at_once(self, lines, said, tmp_path):
        told = failure(tmp_path, "train", *lines, epochs=40)
        assert said in told
        assert "lower lr in optim_conf" in told and f"remove {tmp_path}" in told

    def test_a_training_that_diverged_in_its_last_epoch_is_no_success(self, tmp_path):
        line = EPOCH.format(2, "nan", "nan")
        assert "train loss is nan" in failure(tmp_path, "say", line, epochs=2)

    def test_a_resumed_training_keeps_its_log_and_shows_new_epochs_only(self, tmp_path, capsys):
        log = tmp_path / "asr_x.log"
        log.write_text(EPOCH.format(1, "9.0", "nan") + "\nerror: the power went\n")
        (tmp_path / "checkpoint.pth").touch()
        run_jobs([stub(tmp_path, "say", EPOCH.format(2, "1.5", "1.4"), epochs=2)], 1)
        out = capsys.readouterr().out
        assert "epoch 1/2" not in out and "epoch 2/2, train loss 1.5, valid loss 1.4" in out
        lines = log.read_text().splitlines()
        assert "1epoch" in lines[0] and "2epoch" in lines[-1]
        assert lines[2].startswith("# 20") and "resumed from checkpoint.pth" in lines[2]
        assert f"{STUBS} say" in lines[2]

    def test_warnings_of_a_job_are_shown(self, tmp_path, capsys):
        run_jobs([stub(tmp_path, "say", "warning: checkpoint.pth cannot be read")], 1)
        assert "asr_x: warning: checkpoint.pth cannot be read" in capsys.readouterr().err
