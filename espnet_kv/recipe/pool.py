"""Processes that end with the run that started them, and a map over worker processes.

Each process of the recipe leads its own process group and watches a pipe whose other end is open
only in the run. When the run ends, even by `kill -9`, the pipe is closed and the watcher kills the
group: the process, its data loaders and its other children. (Linux's parent-death signal would end
only the process itself.)
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from espnet_kv.errors import UserError

PER_CORE = 4
OUT_OF_MEMORY = "most likely for lack of memory"


class Terminated(KeyboardInterrupt):
    """The run received signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def terminate_on_signals() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end the block by an exception, so that `finally` blocks run.

    Signals that were ignored before (nohup) stay ignored. Further signals are ignored during the
    cleanup of a few seconds. It works in the main thread only.

    Raises:
        SystemExit: a signal came; its code is 128 + the signal's number. One line was printed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ends()}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def end(number: int, _: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    try:
        for number in caught:
            signal.signal(number, end)
        yield
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        print(
            f"error: stopped by {signal.Signals(number).name}: the same command goes on from here",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(128 + number) from None
    finally:
        for number in caught:
            signal.signal(number, before[number])


def _ends() -> list[signal.Signals]:
    return [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@contextmanager
def keyboard_blocked() -> Iterator[None]:
    """Block SIGINT and SIGHUP of the terminal for processes started in this block.

    The run itself receives them when the block ends.
    """
    resource_tracker.ensure_running()  # started within, it would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(pipe: Any) -> None:
    """Lead a process group, and kill it as soon as the other end of `pipe` is closed.

    Args:
        pipe: file descriptor or Connection without data.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)

    def watch() -> None:
        wait([pipe])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """`end_with` the run, in a process of `multiprocessing`."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with(parent.sentinel)


def signal_group(pid: int, number: int) -> bool:
    """Send a signal (0: none) to the group led by `pid`; return whether the group exists."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
        return True
    return False


def end_groups(pids: Sequence[int], poll: Callable[[], Any], grace: float = 2.0) -> None:
    """End the groups led by `pids`: send SIGTERM, and SIGKILL after `grace` seconds.

    Args:
        poll: collects the exit statuses of children, which would stay zombies otherwise.
    """
    left = [pid for pid in pids if signal_group(pid, signal.SIGTERM)]
    for number, seconds in ((signal.SIGKILL, grace), (0, 1.0)):
        end = time.monotonic() + seconds
        while left and time.monotonic() < end:
            poll()
            left = [pid for pid in left if signal_group(pid, 0)]
            time.sleep(0.02)
        for pid in left:
            signal_group(pid, number)


def cores() -> int:
    """Number of processor cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def most_at_once() -> int:
    """Upper limit of parallel processes on this machine, for any --nj.

    Each process loads torch, so more than a few per core would only cost memory.
    """
    return PER_CORE * cores()


CLUSTER: ContextVar[Any] = ContextVar("CLUSTER", default=None)
"""The cluster (`cluster.Cluster`) that does the work in the place of processes of this machine."""


def split[Item](jobs: Iterable[Item], nj: int) -> Iterator[Sequence[Item]]:
    """Consecutive chunks of up to 16 jobs, some for each of `nj` processes.

    Jobs of an iterator, whose number is not known, are chunks by themselves.
    """
    size = max(1, min(16, len(jobs) // (4 * nj))) if isinstance(jobs, Sequence) else 1
    return itertools.batched(jobs, size)


def parallel_map[Item, Result](
    work: Callable[[Item], Result], jobs: Iterable[Item], nj: int
) -> Iterator[Result]:
    """Yield `work(job)` for every job, in order, computed by `nj` processes, or by a cluster.

    Workers end when the caller stops early, at an exception, and with the run. A worker computes
    at most a few chunks ahead of the yielded results, and jobs are taken when there is a worker
    for them.

    Raises:
        UserError: `work` raised an exception (its message), or a worker process was killed.
    """
    if cluster := CLUSTER.get():
        yield from cluster.map(work, jobs, nj)
        return
    chunks = split(jobs, nj)
    begin = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(begin, chunks)
    if nj <= 1 or len(begin) < 2:
        for job in itertools.chain.from_iterable(chunks):
            result, failure = outcome(work, [job])
            yield from result
            if failure is not None:
                raise failure
        return
    workers: list[_Worker] = []
    done: dict[int, tuple[list[Result], UserError | None]] = {}
    given = wanted = 0
    try:
        while True:
            while given < wanted + 4 * nj and (worker := _idle(workers, nj, work)):
                if (chunk := next(chunks, None)) is None:
                    break
                worker.give(given, chunk)
                given += 1
            if wanted == given:
                return
            busy = {worker.pipe: worker for worker in workers if worker.chunk is not None}
            for pipe in wait(list(busy)) if wanted not in done else ():
                number, answer = busy[pipe].take()  # type: ignore[index]
                done[number] = answer
            if wanted in done:
                results, failure = done.pop(wanted)
                wanted += 1
                yield from results
                if failure is not None:
                    raise failure
    finally:
        for worker in workers:
            worker.end()


def _idle(workers: list["_Worker"], nj: int, work: Callable) -> "_Worker | None":
    """A worker without work, a new one where there may be more; None: all are busy."""
    if idle := next((worker for worker in workers if worker.chunk is None), None):
        return idle
    if len(workers) < min(nj, most_at_once()):
        workers.append(_Worker.start(work))
        return workers[-1]
    return None


@dataclass
class _Worker:
    """One process of `parallel_map`.

    pipe: our end of its connection. chunk: number of its current chunk; None: it is idle.
    """

    process: BaseProcess
    pipe: Connection
    chunk: int | None = None

    @classmethod
    def start(cls, work: Callable) -> "_Worker":
        # A fork of a process that has used torch can hang in torch's thread pool.
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        with keyboard_blocked():
            process.start()
        theirs.close()
        return cls(process, pipe)

    def give(self, number: int, chunk: Sequence[Any]) -> None:
        self.chunk = number
        with suppress(BrokenPipeError):  # `take` reports the error
            self.pipe.send(chunk)

    def take(self) -> tuple[int, Any]:
        assert self.chunk is not None
        number, self.chunk = self.chunk, None
        try:
            return number, self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(1)
            raise UserError(
                f"a worker process {ending(self.process.exitcode)}: use a smaller --nj"
            ) from None

    def end(self) -> None:
        self.pipe.close()
        assert self.process.pid is not None
        if not signal_group(self.process.pid, signal.SIGKILL):
            self.process.kill()  # it does not lead a group yet, or has ended
        self.process.join()


def ending(status: int | None) -> str:
    """Describe an exit, e.g. `was killed by signal 9 (SIGKILL), most likely for lack of memory`.

    Args:
        status: exit status; minus the signal's number for a killed process.
    """
    if status is None or status >= 0:
        return f"was killed or ended by itself (status {status}), {OUT_OF_MEMORY}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
    text = f"was killed by signal {-status} ({name})"
    return f"{text}, {OUT_OF_MEMORY}" if -status == signal.SIGKILL else text


def _serve(pipe: Connection, work: Callable) -> None:
    end_with_parent()
    with suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(outcome(work, pipe.recv()))


def outcome(work: Callable, jobs: Sequence[Any]) -> tuple[list[Any], UserError | None]:
    """The results of `jobs` up to the first failure, and that failure."""
    results: list[Any] = []
    try:
        for job in jobs:
            results.append(work(job))
    except UserError as error:
        return results, error
    except Exception as error:
        text = " ".join(str(error).split())
        return results, UserError(f"{type(error).__name__}: {text}" if text else repr(error))
    return results, None
