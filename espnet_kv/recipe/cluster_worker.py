"""What a Dask worker does: a chunk of a data stage, or one command in a process of its own."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError
from espnet_kv.recipe.job import Job, Running
from espnet_kv.recipe.jobs import gpu_names
from espnet_kv.recipe.pool import end_groups, outcome

_in_use: set[str] = set()
_choosing = threading.Lock()


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    failure: why it failed, or nothing. warnings: lines of its log to show. output: folder that
    it wrote in the place of `Job.output`; None where it has none.
    """

    failure: str
    warnings: Sequence[str] = ()
    output: Path | None = None


def do_chunk(
    place: Path, work: Callable, jobs: Sequence[Any]
) -> tuple[list[Any], UserError | None]:
    """The results of `jobs`, up to the first that failed, and its failure.

    Args:
        place: working directory of the run.
    """
    _enter(place)
    return outcome(work, jobs)


def do_job(place: Path, job: Job, threads: int) -> Ending:
    """Run a command to its end; it ends with the worker.

    What it writes goes to a folder of its own: a worker that the run has given up may still be at
    work on the same command.

    Args:
        place: working directory of the run. threads: of torch.
    """
    from distributed import get_worker
    from distributed.core import Status

    _enter(place)
    output = None
    if job.output is not None:
        output = job.output.with_name(f"{unfinished(job.output)}{uuid.uuid4().hex[:8]}")
        job = replace(job, arguments=[*job.arguments, f"--output_dir={output}"])
    try:
        with _gpus(job.gpus) as devices:
            # a worker of Dask may have no children by `multiprocessing`, of which forks are made
            running = Running.start(replace(job, fresh=True), devices, threads)
            worker = get_worker()
            try:
                while (status := running.poll()) is None:
                    if worker.status not in (Status.running, Status.paused):
                        break  # the run has ended
                    time.sleep(0.1)
            finally:
                end_groups([running.pid], running.poll)
            lines = running.log.new_lines()
            failure = running.finish(-15 if status is None else status)
    except UserError as error:
        return Ending(str(error))
    return Ending(failure, [line for line in lines if line.startswith("warning: ")], output)


def unfinished(output: Path) -> str:
    """How the names of folders begin that hold a job's output until it has ended."""
    return f".{output.name}.partial-"


def _enter(place: Path) -> None:
    try:
        os.chdir(place)  # paths of the recipe are relative
    except OSError as error:
        raise UserError(
            f"{place} on {socket.gethostname()}: {error.strerror}: the recipe has to lie on a "
            "file system that all workers share"
        ) from error


@contextmanager
def _gpus(count: int) -> Iterator[list[str]]:
    """GPUs of this worker that no other command of it uses.

    Raises:
        UserError: it has fewer than the cluster's configuration says.
    """
    with _choosing:
        free = [name for name in (gpu_names() if count else []) if name not in _in_use]
        if len(free) < count:
            raise UserError(
                f"gpus: a worker on {socket.gethostname()} finds {len(free)} free GPUs and needs "
                f"{count}: lower gpus in --cluster_config, or ask the scheduler for GPUs"
            )
        _in_use.update(free[:count])
    try:
        yield free[:count]
    finally:
        with _choosing:
            _in_use.difference_update(free[:count])
