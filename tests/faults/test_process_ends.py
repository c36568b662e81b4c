"""Whatever ends a run of the recipe, none of the processes that it started is left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import process_stubs
import pytest
from commands import alive, wait_until

from espnet_kv.errors import UserError
from espnet_kv.recipe.pool import parallel_map

REPO = Path(__file__).parents[2]
STUBS = process_stubs.__name__

# what run.sh starts, in small: jobs on the CPU and on a GPU, or a map over worker processes
RUN = f"""
import signal
import sys
from pathlib import Path
import {STUBS}
from espnet_kv.recipe import job, jobs, pool
job.PRELOAD = []
jobs.visible_gpus = lambda: 1
def jobs_of_both_kinds():
    code = {STUBS}.STUBBORN
    cpu = jobs.Job("cpu", {STUBS!r}, ["family", "a.json", code], Path("a.log"))
    gpu = jobs.Job("gpu", {STUBS!r}, ["family", "b.json"], Path("b.log"), gpus=1)
    jobs.run_jobs([cpu, gpu], 2)
def pool_of_workers():
    list(pool.parallel_map({STUBS}.work_for_ever, ["a.json", "b.json"], 2))
if __name__ == "__main__":
    # whoever started the tests may ignore these, as nohup and a shell in the background do
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pool.terminate_on_signals():
        try:
            {{what}}()
        finally:
            Path("cleaned").touch()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("what", ["jobs_of_both_kinds", "pool_of_workers"])
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_nothing_is_left_of_a_run_that_was_ended(what, number, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN.format(what=what))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    run = subprocess.Popen(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests/support'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids: list[int] = []
    try:
        assert wait_until(lambda: all(f.exists() for f in files) or run.poll() is not None, 60)
        assert run.poll() is None, run.communicate()
        pids = [pid for file in files for pid in json.loads(file.read_text())]
        assert len(pids) == 4 and all(alive(pid) for pid in pids)
        if number == "SIGINT":
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(run.pid, signal.Signals[number])
        _, err = run.communicate(timeout=20)
        assert wait_until(lambda: not any(alive(pid) for pid in pids), 5)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        run.kill()
    if number == "SIGKILL":
        return
    assert run.returncode == 128 + signal.Signals[number]
    assert err.splitlines() == [f"error: stopped by {number}: the same command goes on from here"]
    assert (tmp_path / "cleaned").exists()


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    code = """
import os, signal
from espnet_kv.recipe.pool import terminate_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with terminate_on_signals():
    os.kill(os.getpid(), signal.SIGHUP)
print("went on")
"""
    env = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout == "went on\n"


class TestPool:
    @pytest.mark.parametrize("nj", [1, 2, 32])
    def test_results_do_not_depend_on_the_number_of_workers(self, nj):
        numbers = list(range(50))
        assert list(parallel_map(process_stubs.square, numbers, nj)) == [n * n for n in numbers]

    @pytest.mark.parametrize("nj", [1, 2])
    def test_jobs_are_taken_when_there_is_room_for_them(self, nj):
        taken = []
        results = parallel_map(process_stubs.square, (taken.append(n) or n for n in range(99)), nj)
        assert next(results) == 0
        assert len(taken) <= 4 * nj + 2
        assert list(results) == [n * n for n in range(1, 99)]

    @pytest.mark.parametrize("nj", [1, 2])
    def test_an_exception_is_told_in_one_line_after_the_results_before_it(self, nj):
        results = []
        with pytest.raises(UserError, match=r"^ValueError: three is one too many$"):
            for result in parallel_map(process_stubs.fail_at_three, range(40), nj):
                results.append(result)
        assert results == [0, 1, 2]

    def test_a_worker_without_memory_is_told(self):
        with pytest.raises(UserError, match=r"a worker process was killed by signal 9.*smaller"):
            list(parallel_map(process_stubs.kill_at_three, range(40), 2))

    def test_a_caller_that_stops_early_leaves_no_workers(self):
        def children() -> set[int]:
            listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            return {int(pid) for pid in listed if alive(int(pid))}

        list(parallel_map(process_stubs.square, range(4), 2))  # starts Python's resource tracker
        before = children()
        results = parallel_map(process_stubs.square, range(40), 2)
        assert next(results) == 0
        assert len(children() - before) == 2
        results.close()
        assert wait_until(lambda: children() <= before, 5)
