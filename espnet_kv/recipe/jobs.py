"""Running ESPnet's commands side by side, each in a forked process with a log of its own.

Loading ESPnet takes longer than many a job, so the parent loads it once and every job is a fork.
"""

import logging
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError

# the line of ESPnet's trainer that closes an epoch
EPOCH = re.compile(
    r"(?P<epoch>\d+)epoch results: \[train\].*?[ ,]loss=(?P<train>[\d.]+)"
    r".*?\[valid\](?:.*?[ ,]acc=(?P<acc>[\d.]+))?.*?[ ,]loss=(?P<valid>[\d.]+)"
)


@dataclass
class Job:
    """One command.

    name: what progress lines call it.
    run: the work; it may return an exit status.
    log: file that gets its standard output and error.
    epochs: number of training epochs; 0 where there are none to show.
    after: called when the job has ended well.
    """

    name: str
    run: Callable[[], int | None]
    log: Path
    epochs: int = 0
    after: Callable[[], None] = lambda: None
    _position: int = field(default=0, repr=False)

    def new_epochs(self) -> list[str]:
        """Progress lines for the epochs that ended since the last call."""
        if not self.epochs or not self.log.exists():
            return []
        with self.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._position)
            text = log.read()
        complete = text.rfind("\n") + 1
        self._position += len(text[:complete].encode("utf-8", errors="replace"))
        lines = []
        for found in EPOCH.finditer(text[:complete]):
            accuracy = f", accuracy {found['acc']}" if found["acc"] else ""
            lines.append(
                f"  {self.name}: epoch {found['epoch']}/{self.epochs}, train loss "
                f"{found['train']}, valid loss {found['valid']}{accuracy}"
            )
        return lines


def run_jobs(jobs: Sequence[Job], parallel: int, threads: int | None = None) -> None:
    """Run `jobs`, at most `parallel` at a time, showing progress.

    When one fails the others still finish, so that a rerun has only the failed one to do.

    Args:
        threads: torch threads of each job; None shares the cores out evenly.

    Raises:
        UserError: at least one job failed; names its log and the last line there.
    """
    if not jobs:
        return
    parallel = max(1, min(parallel, len(jobs)))
    threads = threads or max(1, cores() // parallel)
    import espnet2.bin.asr_inference  # noqa: F401  (the costly import, shared by the forks)

    fork = multiprocessing.get_context("fork")
    waiting, running, failed = list(jobs), list[tuple[Job, Any]](), list[Job]()
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                process = fork.Process(target=_child, args=(job, threads), name=job.name)
                process.start()
                if job.epochs:
                    print(f"  {job.name}: training, log in {job.log}", flush=True)
                running.append((job, process))
            time.sleep(0.2)
            for job, process in list(running):
                for line in job.new_epochs():
                    print(line, flush=True)
                if process.exitcode is not None:
                    running.remove((job, process))
                    done += 1
                    if process.exitcode:
                        failed.append(job)
                    else:
                        job.after()
                    state = "failed" if process.exitcode else "done"
                    print(f"  {job.name}: {state} ({done}/{len(jobs)})", flush=True)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.join()
    if failed:
        job = failed[0]
        raise UserError(
            f"{job.name} failed ({len(failed)} of {len(jobs)} jobs did): "
            f"{last_line(job.log)} (whole log: {job.log})"
        )


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _child(job: Job, threads: int) -> None:
    with job.log.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    torch.set_num_threads(threads)
    # what the parent's imports set up would keep ESPnet's own logging from being set up
    logging.root.handlers.clear()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        status = job.run() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def last_line(log: Path) -> str:
    """What a log ends with; of an error, what it says."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it printed nothing"
