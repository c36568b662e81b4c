"""One command of the recipe in its own process, with a log.

Loading ESPnet takes longer than many jobs. Therefore jobs on the CPU are forks of a server process
that has loaded ESPnet without GPUs. Jobs on GPUs are new processes, because CUDA cannot be used
after a fork. The run itself does not load ESPnet.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe import child
from espnet_kv.recipe.logs import ALL_INVALID, JobLog, parse_epoch
from espnet_kv.recipe.pool import OUT_OF_MEMORY, end_groups, ending, keyboard_blocked, signal_group

CUDA_DEVICES = "CUDA_VISIBLE_DEVICES"
PRELOAD = ["espnet2.bin.asr_inference", "espnet_kv.espnet.task", "espnet_kv.bin.asr_inference"]
"""Modules loaded by the server."""
FULL = 1 << 14
"""Free bytes of a disk below which a log may be incomplete."""
LESS_MEMORY = "use fewer jobs side by side (--nj, --train_nj, --inference_nj) or smaller batch_bins"


@dataclass
class Job:
    """One command.

    name: name in progress lines.
    module: module with main(arguments), which may return an exit status.
    arguments: options of the command.
    log: file to which standard output and error are appended.
    gpus: number of GPUs; 0: the job runs on the CPU.
    shares: other jobs that share may run on its GPUs at the same time.
    epochs: number of training epochs; 0: no epochs to show.
    after: called in the run after the job has succeeded; a UserError is a failure of the job.
    fresh: start a new process, also on the CPU, e.g. in a worker of a cluster.
    output: its --output_dir, if that directory holds only what this command writes.
    """

    name: str
    module: str
    arguments: Sequence[str]
    log: Path
    gpus: int = 0
    epochs: int = 0
    after: Callable[[], None] = lambda: None
    fresh: bool = False
    output: Path | None = None
    shares: bool = False


@dataclass
class Running:
    """A running job.

    devices: names of its GPUs.
    watched: our end of the pipe that a new process watches, see `espnet_kv.recipe.pool`.
    failure: failure found in the log while the job runs; empty: none.
    """

    job: Job
    process: BaseProcess | subprocess.Popen
    log: JobLog
    devices: Sequence[str] = ()
    watched: int | None = None
    failure: str = field(default="", init=False)

    @classmethod
    def start(cls, job: Job, devices: Sequence[str], threads: int) -> "Running":
        """Start a job as the leader of a new process group.

        Args:
            devices: GPUs, named as in CUDA_VISIBLE_DEVICES. threads: number of torch threads.

        Raises:
            UserError: the log cannot be written, or the process cannot be started.
        """
        _begin_log(job)
        log = JobLog(job.log)
        if job.epochs:
            print(f"  {job.name}: training, log in {job.log}", flush=True)
        environment = dict(os.environ)
        environment[CUDA_DEVICES] = ",".join(devices)  # empty for a job on the CPU
        environment["OMP_NUM_THREADS"] = str(threads)
        if not job.gpus and not job.fresh:
            with contextlib.suppress(OSError, EOFError, ValueError):
                return cls(job, _fork(job, environment, threads), log)
        try:
            process, watched = _fresh(job, environment)
        except OSError as error:
            raise UserError(f"{job.name} cannot be started: {error.strerror}") from error
        return cls(job, process, log, devices, watched)

    @property
    def pid(self) -> int:
        """Id of its process and of its process group."""
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit status, or minus the number of the signal that killed it; None: it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def show_progress(self) -> None:
        """Print new epochs and warnings; a loss that is not finite is a failure."""
        for line in self.log.new_lines():
            if line.startswith("warning: "):
                print(f"  {self.job.name}: {line}", file=sys.stderr, flush=True)
            if not self.job.epochs or self.failure:
                continue
            if epoch := parse_epoch(line):
                shown = f"{self.job.name}: epoch {epoch.number}/{self.job.epochs}, {epoch}"
                print(f"  {shown}", flush=True)
                if wrong := epoch.not_finite():
                    self.failure = self._diverged(epoch.number, wrong)
            elif found := ALL_INVALID.search(line):
                self.failure = self._diverged(int(found[1]), "all gradients are inf or nan")

    def _diverged(self, epoch: int, wrong: str) -> str:
        return (
            f"{self.job.name} was stopped in epoch {epoch}: {wrong}: lower lr in optim_conf or "
            f"set use_amp: false, then remove {self.job.log.parent} or give the experiment "
            f"another name (whole log: {self.job.log})"
        )

    def finish(self, status: int | None) -> str:
        """End the remaining processes of the job; return the reason of its failure, or ""."""
        if status is None:
            end_groups([self.pid], self.poll)
        signal_group(self.pid, signal.SIGKILL)  # remaining children
        if self.watched is not None:
            os.close(self.watched)
        if self.failure:
            return self.failure
        if status == 0:
            try:
                self.job.after()
            except UserError as error:
                return str(error)
            return ""
        assert status is not None
        reason = ending(status) if status < 0 else self.log.reason()
        if shutil.disk_usage(self.job.log.parent).free < FULL:
            reason = f"No space left where {self.job.log} is"  # the log is incomplete too
        if OUT_OF_MEMORY in reason or "out of memory" in reason or "SIGKILL" in reason:
            reason += f": {LESS_MEMORY}"
        return f"{self.job.name} failed: {reason} (whole log: {self.job.log})"


def _begin_log(job: Job) -> None:
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            if log.tell():
                resumed = job.epochs and (job.log.parent / "checkpoint.pth").exists()
                how = "resumed from checkpoint.pth" if resumed else "started again"
                date = time.strftime("%Y-%m-%d %H:%M:%S")
                log.write(f"# {date} {how}: {job.module} {shlex.join(job.arguments)}\n")
    except OSError as error:
        raise UserError(f"{job.log} cannot be written: {error.strerror}") from error


def _fork(job: Job, environment: dict[str, str], threads: int) -> BaseProcess:
    """Start a fork of the server, and the server if it is not running.

    Raises:
        OSError, EOFError, ValueError: the server is not supported here, or does not start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(
        target=child.forked,
        args=(job.module, list(job.arguments), job.log.resolve(), environment, threads),
        name=job.name,
    )
    with _no_gpu():
        with keyboard_blocked(), _silent():
            multiprocessing.forkserver.ensure_running()
        process.start()
    return process


@contextlib.contextmanager
def _no_gpu() -> Iterator[None]:
    """Hide GPUs from processes started here: importing ESPnet would initialise CUDA."""
    before = os.environ.get(CUDA_DEVICES)
    os.environ[CUDA_DEVICES] = ""
    try:
        yield
    finally:
        del os.environ[CUDA_DEVICES]
        if before is not None:
            os.environ[CUDA_DEVICES] = before


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide stderr of processes started here; a failure is reported by the new process instead."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _fresh(job: Job, environment: dict[str, str]) -> tuple[subprocess.Popen, int]:
    """Start a new process; return it and our end of the pipe that it watches."""
    read, write = os.pipe()
    try:
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", child.__name__, str(read), job.module, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(read,),
                process_group=0,
            )
    except BaseException:
        os.close(write)
        raise
    finally:
        os.close(read)
    return process, write
