"""How time and peak memory grow with the length of the audio.

On a CPU peak memory is read off the process, so each measurement has one for itself: a process is
spawned, loads the model, warms up, and forks for every measurement.
"""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet_kv.errors import UserError
from espnet_kv.profile.clock import median, milliseconds, undisturbed
from espnet_kv.profile.sound import Sound, features
from espnet_kv.profile.subject import Source, Subject

WARM_UP_SECONDS = 1.5
# chunks at the end of a length whose median counts
LAST_CHUNKS = 25
# a length is encoded again until it took so long, or so often
ENOUGH_MS, MOST_RUNS = 2000.0, 3

LIBC = ctypes.CDLL(None)
# of malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Linux: forgets the peak of a process
FORGET = Path("/proc/self/clear_refs")
RESETS = os.access(FORGET, os.W_OK)

type Row = dict[str, Any]
"""seconds, encode_ms, offline_bytes; or seconds, chunk_ms, streaming_bytes."""


class Peak:
    """Most bytes held since it was made, beyond those held then."""

    method = "cuda allocator"

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    @staticmethod
    def without_reserve() -> contextlib.AbstractContextManager[None]:
        """Within it what is freed is no longer held; the allocator counts what is in use."""
        return contextlib.nullcontext()

    def read(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated() - self._before


class ProcessPeak:
    """The same, of the resident set of this process."""

    method = "peak resident set of a child process"

    def __init__(self) -> None:
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)  # what is free would hide growth
        if RESETS:
            FORGET.write_text("5")
        self._before = self._most()

    @staticmethod
    @contextlib.contextmanager
    def without_reserve() -> Iterator[None]:
        """Within it glibc hands blocks back as they are freed, which costs time.

        Else it keeps those of up to 32 MiB for later, in pieces that may fit nobody.
        """
        if not hasattr(LIBC, "mallopt"):
            yield
            return
        LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 17)
        try:
            yield
        finally:
            LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 25)
            LIBC.mallopt(M_TRIM_THRESHOLD, 1 << 26)

    def read(self) -> int:
        """Bytes."""
        return self._most() - self._before

    @staticmethod
    def _most() -> int:
        status = Path("/proc/self/status")
        if status.exists():
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            if found:
                return 1024 * int(found[1])
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


type PeakType = type[Peak] | type[ProcessPeak]


def encode(subject: Subject, samples: Tensor, peak: PeakType, seconds: float) -> Row:
    """The encoder over the whole, its features ready: time and peak memory."""
    xs = features(subject, samples)[None]
    # as a list: of a tensor ESPnet makes padding masks by way of a square of T x T features, which
    # at ten minutes is larger than everything else together
    lengths = [xs.size(1)]

    def run() -> None:
        subject.encoder(xs, lengths)

    with torch.no_grad(), subject.offline(), undisturbed(), _unwarned():
        with peak.without_reserve():
            memory = peak()
            run()
            grown = memory.read()
        times: list[float] = []
        while sum(times) < ENOUGH_MS and len(times) < MOST_RUNS:
            times.append(milliseconds(subject.device, run))
    return {"seconds": seconds, "encode_ms": median(times), "offline_bytes": grown}


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Within it ESPnet does not say of every list of lengths that it cannot be traced."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def stream(
    subject: Subject, samples: Tensor, peak: PeakType, seconds: Sequence[float]
) -> Iterator[Row]:
    """One stream through features and encoder, looked at after each of these lengths."""
    samples = samples.to(subject.device)
    size = round(subject.chunk_seconds * subject.sample_rate)
    frontend = subject.frontend()
    times: list[float] = []
    with torch.no_grad(), undisturbed():
        memory = peak()
        state = subject.init_state()
        heard = 0
        for length in seconds:
            while heard < round(length * subject.sample_rate):
                x = frontend(samples[heard : heard + size])[None]
                before = state.frames[0]
                spent = milliseconds(subject.device, subject.encoder.forward_chunk, x, state)
                heard += size
                if state.frames[0] > before:
                    times.append(spent)
            chunk_ms = median(times[-LAST_CHUNKS:]) if times else None
            yield {"seconds": length, "chunk_ms": chunk_ms, "streaming_bytes": memory.read()}


@dataclass(frozen=True)
class Task:
    """What is measured; small enough to be sent to another process.

    sound: what is encoded. seconds: lengths, ascending. chunk_size, left_chunks: of streaming.
    """

    source: Source
    sound: Sound
    seconds: Sequence[float]
    chunk_size: int
    left_chunks: int

    def load(self, device: str) -> Subject:
        """The model."""
        return Subject.load(self.source, device, self.chunk_size, self.left_chunks)

    def runs(self, subject: Subject, peak: PeakType) -> list[Callable[[], Iterator[Row]]]:
        """The measurements, each to be made by itself."""

        def one(length: float) -> Iterator[Row]:
            yield encode(subject, self.sound.clip(length), peak, length)

        longest = self.sound.clip(self.seconds[-1])
        return [
            *(partial(one, length) for length in self.seconds),
            lambda: stream(subject, longest, peak, self.seconds),
        ]

    def warm_up(self, subject: Subject, peak: PeakType) -> None:
        """Run everything once on a little audio."""
        samples = self.sound.clip(WARM_UP_SECONDS)
        encode(subject, samples, peak, WARM_UP_SECONDS)
        list(stream(subject, samples, peak, [WARM_UP_SECONDS]))


def measure(task: Task, subject: Subject, say: Callable[[str], None]) -> tuple[str, list[Row]]:
    """How memory was measured, and what was measured at each length, ascending.

    Args:
        subject: the task's, loaded; not used where a process of its own does it.
        say: told each row.

    Raises:
        UserError: the process that measures came to grief.
    """
    rows: dict[float, Row] = {seconds: {"seconds": seconds} for seconds in task.seconds}
    if subject.device == "cpu":
        method, measured = ProcessPeak.method, _measure_apart(task)
    else:
        task.warm_up(subject, Peak)
        method = Peak.method
        measured = _measure_here(task, subject)
    for row in measured:
        rows[row["seconds"]] |= row
        found = {key: value for key, value in row.items() if key != "seconds" and value is not None}
        said = ", ".join(f"{key} {value:.6g}" for key, value in found.items())
        say(f"{row['seconds']:g} s: {said or 'shorter than a chunk'}")
    for missing in (row["seconds"] for row in rows.values() if "encode_ms" not in row):
        say(f"{missing:g} s: not enough memory to encode it in one go")
    return method, list(rows.values())


def _measure_here(task: Task, subject: Subject) -> Iterator[Row]:
    for run in task.runs(subject, Peak):
        # where memory does not suffice the length stays unmeasured
        with contextlib.suppress(torch.OutOfMemoryError):
            yield from run()


def _measure_apart(task: Task) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(task, theirs, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        while True:
            try:
                row = ours.recv()
            except EOFError:
                break
            yield row
    finally:
        ours.close()
        process.join()
    if process.exitcode:
        raise UserError(
            f"the process that measures memory ended with status {process.exitcode}; what it said "
            "stands above"
        )


def _serve(task: Task, out: Connection, threads: int) -> None:
    """In the spawned process: load the model, then fork for every measurement."""
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    subject = task.load("cpu")
    fork = multiprocessing.get_context("fork")
    for run in task.runs(subject, ProcessPeak):

        def work(run: Callable[[], Iterator[Row]] = run) -> None:
            torch.set_num_threads(threads)
            task.warm_up(subject, ProcessPeak)
            for row in run():
                out.send(row)

        process = fork.Process(target=work)
        process.start()
        process.join()
        # killed: as where memory does not suffice
        if process.exitcode not in (0, -signal.SIGKILL):
            sys.exit(1)
