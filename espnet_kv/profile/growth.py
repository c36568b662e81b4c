"""How time and peak memory grow with the length of the audio.

On a CPU each measurement runs in a process of its own, so that a length for which memory does not
suffice ends that process and not the profile: another process loads the model, and forks for every
measurement.
"""

import contextlib
import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import Tensor

from espnet_kv.errors import UserError
from espnet_kv.heap import return_freed_memory
from espnet_kv.profile.clock import median, milliseconds, undisturbed
from espnet_kv.profile.memory import METHODS, peak_bytes, peak_resident_bytes
from espnet_kv.profile.sound import Sound, features
from espnet_kv.profile.subject import Source, Subject

WARM_UP_SECONDS = 1.5
# chunks at the end of a length whose median counts
LAST_CHUNKS = 25
# a length is encoded again until it took so long, or so often
ENOUGH_MS, MOST_RUNS = 2000.0, 3

type Row = dict[str, Any]
"""seconds and encode_ms, offline_bytes, offline_rss_bytes; or chunk_ms, streaming_bytes, ..."""


def encode(subject: Subject, samples: Tensor, seconds: float) -> Row:
    """The encoder over the whole, its features ready: time and peak memory."""
    xs = features(subject, samples)[None]

    def run() -> None:
        subject.encode(xs)

    with torch.no_grad(), subject.offline(), undisturbed(), _unwarned():
        resident = peak_resident_bytes(run)
        allocated = peak_bytes(subject.device, run)
        times: list[float] = []
        while sum(times) < ENOUGH_MS and len(times) < MOST_RUNS:
            times.append(milliseconds(subject.device, run))
    return {
        "seconds": seconds,
        "encode_ms": median(times),
        "offline_bytes": allocated,
        "offline_rss_bytes": resident,
    }


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Within it ESPnet does not say of every list of lengths that it cannot be traced."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def stream(subject: Subject, sound: Sound, seconds: Sequence[float]) -> Iterator[Row]:
    """One stream through features and encoder, measured after each of these lengths.

    Its memory is what the stream holds between two chunks and the peak of the next chunk.
    """
    more = (1 + len(seconds)) * subject.chunk_seconds  # the chunks that memory is measured in
    samples = sound.clip(seconds[-1] + more).to(subject.device)
    size = round(subject.chunk_seconds * subject.sample_rate)
    process = psutil.Process()
    with torch.no_grad(), undisturbed():
        return_freed_memory()  # as in peak_resident_bytes
        resident = process.memory_info().rss
        frontend, state = subject.frontend(), subject.init_state()
        fed, times = 0, list[float]()

        def feed() -> float | None:
            """The time of the next chunk in ms; None while no frame of the encoder is complete."""
            nonlocal fed
            x = frontend(samples[fed : fed + size])[None]
            fed += size
            before = state.frames[0]
            spent = milliseconds(subject.device, subject.encoder.forward_chunk, x, state)
            return spent if state.frames[0] > before else None

        for length in seconds:
            while fed < round(length * subject.sample_rate):
                if (spent := feed()) is not None:
                    times.append(spent)
            chunk_ms = median(times[-LAST_CHUNKS:]) if times else None
            held = state.capacity_bytes + frontend.nbytes
            yield {
                "seconds": length,
                "chunk_ms": chunk_ms,
                "streaming_bytes": held + peak_bytes(subject.device, feed),
                "streaming_rss_bytes": process.memory_info().rss - resident,
            }


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

    def runs(self, subject: Subject) -> list[Callable[[], Iterator[Row]]]:
        """The measurements, each to be made by itself."""

        def one(length: float) -> Iterator[Row]:
            yield encode(subject, self.sound.clip(length), length)

        whole = [partial(one, length) for length in self.seconds]
        if not subject.streams:
            return [*whole]
        return [*whole, lambda: stream(subject, self.sound, self.seconds)]

    def warm_up(self, subject: Subject) -> None:
        """Run everything once on a little audio."""
        samples = self.sound.clip(WARM_UP_SECONDS)
        encode(subject, samples, WARM_UP_SECONDS)
        if subject.streams:
            list(stream(subject, self.sound, [WARM_UP_SECONDS]))


def measure(task: Task, subject: Subject, say: Callable[[str], None]) -> tuple[str, list[Row]]:
    """How memory was measured, and what was measured at each length, ascending.

    Args:
        subject: the task's, loaded; not used where a process of its own does it.
        say: told each row.

    Raises:
        UserError: the process that measures failed.
    """
    rows: dict[float, Row] = {seconds: {"seconds": seconds} for seconds in task.seconds}
    if subject.device == "cpu":
        measured = _measure_apart(task)
    else:
        task.warm_up(subject)
        measured = _measure_here(task, subject)
    for row in measured:
        rows[row["seconds"]] |= row
        found = {key: value for key, value in row.items() if key != "seconds" and value is not None}
        said = ", ".join(f"{key} {value:.6g}" for key, value in found.items())
        say(f"{row['seconds']:g} s: {said or 'shorter than a chunk'}")
    for missing in (row["seconds"] for row in rows.values() if "encode_ms" not in row):
        say(f"{missing:g} s: not enough memory to encode it in one go")
    return METHODS[subject.device], list(rows.values())


def _measure_here(task: Task, subject: Subject) -> Iterator[Row]:
    for run in task.runs(subject):
        # where memory does not suffice the length stays unmeasured
        with contextlib.suppress(torch.OutOfMemoryError):
            yield from run()


def _measure_apart(task: Task) -> Iterator[Row]:
    threads = torch.get_num_threads()
    # torch's pool of threads would not survive a fork; a spawned process has to import ESPnet again
    context: Any = multiprocessing.get_context("fork" if threads == 1 else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(task, theirs, threads))
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
            f"the process that measures memory ended with status {process.exitcode}; its message "
            "stands above"
        )


def _serve(task: Task, out: Connection, threads: int) -> None:
    """In the other process: load the model, then fork for every measurement."""
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    subject = task.load("cpu")
    fork = multiprocessing.get_context("fork")
    for run in task.runs(subject):

        def work(run: Callable[[], Iterator[Row]] = run) -> None:
            torch.set_num_threads(threads)
            task.warm_up(subject)
            for row in run():
                out.send(row)

        process = fork.Process(target=work)
        process.start()
        process.join()
        # killed: as where memory does not suffice
        if process.exitcode not in (0, -signal.SIGKILL):
            sys.exit(1)
