"""Running commands in parallel, and assigning the GPUs of this machine to them."""

import functools
import glob
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing

from espnet_kv.errors import UserError, one_line
from espnet_kv.recipe.job import CUDA_DEVICES, Job, Running
from espnet_kv.recipe.pool import CLUSTER, cores, end_groups, most_at_once

__all__ = [
    "Job",
    "check_gpus",
    "cores",
    "gpu_names",
    "run_jobs",
    "visible_gpus",
]

# device files of the drivers of NVIDIA, Jetson, AMD and WSL
_DEVICE_FILES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/kfd", "/dev/dxg")


def run_jobs(jobs: Sequence[Job], parallel: int, threads: int | None = None) -> None:
    """Run `jobs`, at most `parallel` at a time, or on a cluster, and show progress.

    If one fails, the others still finish, so that a rerun has only the failed job to do. All jobs
    end with the run. Jobs on GPUs wait until enough GPUs are free, unless all of them share.

    Args:
        threads: torch threads of each job; None: cores / parallel jobs, at most OMP_NUM_THREADS.

    Raises:
        UserError: at least one job failed; states the reason and the log.
    """
    if not jobs:
        return
    cluster, failures = CLUSTER.get(), list[str]()
    endings = cluster.run(jobs) if cluster else _run_here(jobs, parallel, threads)
    with closing(endings):
        for done, (job, failure) in enumerate(endings, 1):
            if failure:
                failures.append(failure)
            state = "failed" if failure else "done"
            print(f"  {job.name}: {state} ({done}/{len(jobs)})", flush=True)
    if failures:
        count = f" ({len(failures)} of {len(jobs)} jobs failed)" if len(jobs) > 1 else ""
        raise UserError(failures[0] + count)


def _run_here(
    jobs: Sequence[Job], parallel: int, threads: int | None
) -> Generator[tuple[Job, str]]:
    """Run jobs on this machine; yield each with its failure, or nothing, as it ends."""
    check_gpus(max(job.gpus for job in jobs), "ngpu")
    free = gpu_names() if any(job.gpus for job in jobs) else []
    parallel = max(1, min(parallel, len(jobs), most_at_once()))
    if all(job.shares for job in jobs):
        free = free * parallel  # in turns, so that each GPU has about as many
    threads = threads or _threads(parallel)
    waiting, running = list(jobs), list[Running]()
    try:
        while waiting or running:
            while len(running) < parallel and (job := _first_that_fits(waiting, free)):
                waiting.remove(job)
                devices, free = free[: job.gpus], free[job.gpus :]
                running.append(Running.start(job, devices, threads))
            time.sleep(0.1)
            for process in list(running):
                status = process.poll()  # before its last lines are read
                process.show_progress()
                if status is None and not process.failure:
                    continue
                failure = process.finish(status)
                running.remove(process)
                free = [*process.devices, *free]
                yield process.job, failure
    finally:
        end_groups(
            [process.pid for process in running],
            lambda: [process.poll() for process in running],
        )


def _threads(parallel: int) -> int:
    """Threads of each of `parallel` jobs: its share of the cores, at most OMP_NUM_THREADS.

    Threads that share their core with other work wait for each other, and training takes many
    times as long.
    """
    share = max(1, cores() // parallel)
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, min(share, int(limit))) if limit.isdecimal() else share


def _first_that_fits(waiting: Sequence[Job], free: Sequence[str]) -> Job | None:
    return next((job for job in waiting if job.gpus <= len(free)), None)


def visible_gpus() -> int:
    """Number of GPUs that torch can use, limited by CUDA_VISIBLE_DEVICES.

    A child process counts them, because a process that has initialised CUDA holds GPU memory and
    must not fork.
    """
    return _count_gpus(os.environ.get(CUDA_DEVICES))


def check_gpus(ngpu: int, option: str) -> None:
    """Check that this machine has `ngpu` GPUs.

    Args:
        option: name of the option, for the message.

    Raises:
        UserError: there are fewer GPUs, or `ngpu` is negative.
    """
    if ngpu < 0:
        raise UserError(f"{option} {ngpu}: a number of GPUs is 0 or more")
    if ngpu and (count := visible_gpus()) < ngpu:
        given = os.environ.get(CUDA_DEVICES)
        hidden = "" if given is None else f" ({CUDA_DEVICES} is {given!r})"
        there = f"{count} GPU{'s' * (count != 1)}" if count else "no GPU"
        way_out = f"{option} {count}" if count else f"{option} 0 to compute on the CPU"
        raise UserError(f"{option} {ngpu}: torch finds {there} here{hidden}: give {way_out}")


def gpu_names() -> list[str]:
    """Names of the available GPUs for CUDA_VISIBLE_DEVICES."""
    count, given = visible_gpus(), os.environ.get(CUDA_DEVICES)
    if given is None:
        return [str(n) for n in range(count)]
    # CUDA ignores names from the first unknown one on
    return [name.strip() for name in given.split(",")][:count]


@functools.cache
def _count_gpus(devices: str | None) -> int:
    if devices is not None and devices.strip() in ("", "-1"):
        return 0
    if sys.platform.startswith("linux") and not any(map(glob.glob, _DEVICE_FILES)):
        return 0  # avoids loading torch, which takes seconds
    code = "import torch; print('gpus', torch.cuda.device_count())"
    try:
        counted = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        said = one_line(error)
    else:
        last = counted.stdout.split()[-2:]
        if len(last) == 2 and last[0] == "gpus":
            return int(last[1])
        said = counted.stderr.strip().rpartition("\n")[2] or f"status {counted.returncode}"
    print(f"warning: GPUs cannot be counted, none is used: {said}", file=sys.stderr, flush=True)
    return 0
