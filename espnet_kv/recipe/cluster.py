"""The recipe's work on several machines, over Dask: `--cluster KIND --cluster_config FILE`.

Two kinds of work go there: chunks of the data stages (`pool.parallel_map`) and commands
(`jobs.run_jobs`). Dask starts the workers and gives a lost worker's tasks to others; this module
bounds what is under way, and takes each result once.
"""

import itertools
import logging
import os
import queue
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError, one_line
from espnet_kv.recipe import cluster_config, cluster_worker
from espnet_kv.recipe.job import Job
from espnet_kv.recipe.pool import CLUSTER, keyboard_blocked, split

STAGES = (1, 2, 3, 10, 12, 14)
"""Stages whose work goes to a cluster; training has ESPnet's own launchers."""
LOST = 3
"""Workers that may be lost at one part before it counts as the cause (Dask's allowed-failures)."""
LOOK = 1.0
"""Seconds between two looks at the number of workers."""


class Cluster:
    """A Dask cluster that is started when the first work comes.

    Args:
        options: of the cluster's kind, read by `cluster_config.read`.
        place: working directory of the run, which all workers see.
    """

    def __init__(self, options: cluster_config.Options, place: Path) -> None:
        self._options, self._place = options, place
        self._cluster: Any = None
        self._client: Any = None
        self._workers: set[str] = set()
        self._alone_since = self._looked = 0.0

    def map(self, work: Callable, jobs: Iterable[Any], nj: int) -> Iterator[Any]:
        """`work` of every job, in order; see `pool.parallel_map`.

        What has been computed ahead stays with the workers, some chunks for each.

        Raises:
            UserError: `work` raised an exception, or the workers are lost.
        """
        self._start()
        waiting = split(jobs, nj)
        ahead: deque[Any] = deque()
        while True:
            room = 4 * max(nj, len(self._workers)) - len(ahead)
            for chunk in itertools.islice(waiting, max(0, room)):
                ahead.append(
                    self._client.submit(
                        cluster_worker.do_chunk, self._place, work, chunk, pure=False
                    )
                )
            if not ahead:
                return
            results, failure = self._result(ahead.popleft())
            yield from results
            if failure is not None:
                raise failure

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, str]]:
        """Run commands; yields each with its failure, or nothing, as it ends.

        Raises:
            UserError: the workers are lost, or have no GPU where one is asked for.
        """
        options = self._options
        if (gpus := max(job.gpus for job in jobs)) > options.gpus:
            raise UserError(
                f"{options.where}: gpus is {options.gpus}: a job of this stage needs {gpus}: "
                "write gpus: 1 for workers that have one, or give --gpu_inference false --ngpu 0"
            )
        self._start()
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        left = {}
        for job in jobs:
            future = self._client.submit(
                cluster_worker.do_job,
                self._place,
                replace(job, after=cluster_config.nothing),
                options.threads_per_job,
                pure=False,
                resources={"GPU": job.gpus} if job.gpus else None,
            )
            left[future.key] = job
            future.add_done_callback(ended.put)
            del future  # the callback keeps it
        while left:
            try:
                future = ended.get(timeout=LOOK)
            except queue.Empty:
                self._look()
                continue
            job = left.pop(future.key)
            yield job, self._finish(job, future)

    def _finish(self, job: Job, future: Any) -> str:
        """Take over what one attempt at a job has written; its failure, or nothing."""
        from distributed import KilledWorker

        try:
            ending = future.result()
        except KilledWorker:
            ending = cluster_worker.Ending(f"{job.name} failed: {_killed()} (log: {job.log})")
        except Exception as error:
            raise self._explain(error) from error
        for line in ending.warnings:
            print(f"  {job.name}: {line}", file=sys.stderr, flush=True)
        if job.output is not None:
            if not ending.failure:
                shutil.rmtree(job.output, ignore_errors=True)
                ending.output.rename(job.output)
            for folder in job.output.parent.glob(f"{cluster_worker.unfinished(job.output)}*"):
                shutil.rmtree(folder, ignore_errors=True)
        if not ending.failure:
            try:
                job.after()
            except UserError as error:
                return str(error)
        return ending.failure

    def _result(self, future: Any) -> Any:
        from distributed import KilledWorker, TimeoutError

        while True:
            try:
                return future.result(timeout=LOOK)
            except TimeoutError:
                self._look()
            except KilledWorker as error:
                raise UserError(f"--cluster {self._options.kind}: {_killed()}") from error
            except UserError:
                raise
            except Exception as error:
                raise self._explain(error) from error

    def _explain(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        said = f"{type(error).__name__}: {one_line(error)}"
        return UserError(
            f"--cluster {self._options.kind}: the work there failed ({said}): every worker needs "
            "this Python environment, and the scheduler has to live as long as the run"
        )

    def _look(self) -> None:
        """Show how many workers there are.

        Raises:
            UserError: there has been none for too long.
        """
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        try:
            workers = set(self._client.nthreads())
        except Exception as error:
            raise self._explain(error) from error
        if workers != self._workers:
            lost = len(self._workers - workers)
            told = f" ({lost} gone: what they were at is done again)" if lost else ""
            print(f"  cluster: {len(workers)} workers{told}", flush=True)
            self._workers, self._alone_since = workers, now
        if not workers and self._options.refused:
            raise UserError(
                f"{self._options.where}: the scheduler refused a job: {self._options.refused[0]}"
            )
        if not workers and now - self._alone_since > self._options.wait:
            raise UserError(
                f"--cluster {self._options.kind}: there has been no worker for "
                f"{self._options.wait:g} s: look at its jobs and their logs (log_directory), or "
                f"raise wait in {self._options.where}"
            )

    def _start(self) -> None:
        if self._client is not None:
            return
        import dask
        from distributed import Client

        dask.config.set({"distributed.scheduler.allowed-failures": LOST})
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        print(f"  cluster: {self._options.kind}, {self._options.where}", flush=True)
        with keyboard_blocked():  # the run alone ends them
            self._cluster = self._options.start()
            try:
                self._client = Client(self._cluster)
            except Exception as error:
                raise self._explain(error) from error
        self._alone_since = time.monotonic()

    def close(self) -> None:
        """End the workers, and with them their commands."""
        for part in (self._client, self._cluster):
            if part is not None:
                with suppress(Exception):
                    part.close(timeout=10)
        self._client = self._cluster = None


@contextmanager
def opened(cluster: Cluster | None) -> Iterator[None]:
    """Within it the cluster can be used by `used_in`; it ends with the block."""
    try:
        yield
    finally:
        if cluster is not None:
            cluster.close()


@contextmanager
def used_in(stage: int, cluster: Cluster | None) -> Iterator[None]:
    """Within it the work of `stage` goes to the cluster, where it is work that does."""
    token = CLUSTER.set(cluster if stage in STAGES else None)
    try:
        yield
    finally:
        CLUSTER.reset(token)


def read(options: Mapping[str, Any]) -> Cluster | None:
    """The cluster of --cluster and --cluster_config; None where none is asked for.

    Raises:
        UserError: Dask is missing, or the configuration is wrong.
    """
    kind, file = options["cluster"], options["cluster_config"]
    if kind is None:
        if file is not None:
            raise UserError("--cluster_config goes with --cluster")
        return None
    return Cluster(cluster_config.read(kind, file), Path(os.getcwd()))


def _killed() -> str:
    return (
        f"{LOST + 1} workers were lost at one part, most likely for lack of memory: give them more "
        "memory or fewer threads in --cluster_config, or make parts smaller (--inference_nj)"
    )
