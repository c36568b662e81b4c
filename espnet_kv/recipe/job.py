"""One command of the recipe in a process with a log of its own.

Loading ESPnet takes longer than many a job: jobs on the CPU are forks of a server process that
has it loaded and sees no GPU. Jobs on GPUs are fresh processes, because CUDA does not survive a
fork. The run itself never loads ESPnet.
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
"""Modules that every job on the CPU starts with."""
FULL = 1 << 14
"""Bytes below which a disk has no room for the rest of a log."""
LESS_MEMORY = "use fewer jobs side by side (--nj, --train_nj, --inference_nj) or smaller batch_bins"


@dataclass
class Job:
    """One command.

    name: what progress lines call it.
    module: it has main(arguments), which may return an exit status.
    arguments: the command's options.
    log: file that gets its standard output and error, after what an earlier run wrote there.
    gpus: number of GPUs that it has for itself; 0: it runs on the CPU.
    epochs: number of training epochs; 0 where there are none to show.
    after: called in the run when the job has ended well; a UserError is a failure of the job.
    fresh: it starts with nothing loaded, also on the CPU (its memory is measured).
    output: its --output_dir, where that holds nothing but what this command writes.
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


@dataclass
class Running:
    """A job at work.

    devices: names of the GPUs that are its own. watched: our end of the pipe by which a fresh
    process sees that the run lives. failure: what is wrong already while it still runs.
    """

    job: Job
    process: BaseProcess | subprocess.Popen
    log: JobLog
    devices: Sequence[str] = ()
    watched: int | None = None
    failure: str = field(default="", init=False)

    @classmethod
    def start(cls, job: Job, devices: Sequence[str], threads: int) -> "Running":
        """Start a job; it leads a process group of its own.

        Args:
            devices: GPUs, named as in CUDA_VISIBLE_DEVICES. threads: of torch.

        Raises:
            UserError: its log cannot be written, or this machine starts no more processes.
        """
        _begin_log(job)
        log = JobLog(job.log)
        if job.epochs:
            print(f"  {job.name}: training, log in {job.log}", flush=True)
        environment = dict(os.environ)
        environment[CUDA_DEVICES] = ",".join(devices)  # none: a job on the CPU sees no GPU
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
        """Number of its process, which is that of its process group too."""
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit status, minus a signal's number where that killed it; None: it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def show_progress(self) -> None:
        """Print new epochs and warnings; a loss that is no number is a failure."""
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
        """End what is left of the job; why it failed, or nothing."""
        if status is None:
            end_groups([self.pid], self.poll)
        signal_group(self.pid, signal.SIGKILL)  # what it left behind
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
            reason = f"No space left where {self.job.log} is"  # the log is cut as well
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
    """A fork of the server, which is started where it does not run.

    Raises:
        OSError, EOFError, ValueError: this machine has no such server, or it does not start.
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
    """What starts here sees no GPU: importing ESPnet wakes CUDA, which no fork survives."""
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
    """What starts here says nothing on the terminal: what fails there is told by a fresh job."""
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
    """A new process, and our end of the pipe that it watches."""
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
