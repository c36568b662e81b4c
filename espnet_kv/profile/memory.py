"""Peak memory of a run, counted in two ways: by torch's allocator and by the operating system."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import torch

from espnet_kv.heap import return_freed_memory

SAMPLING_SECONDS = 0.002
METHODS = {"cpu": "torch profiler", "cuda": "cuda allocator"}
"""How `peak_bytes` counts, by device."""


def peak_bytes(device: str, run: Callable[[], object]) -> int:
    """The most bytes that tensors take at once during a run, beyond those that lived before it.

    On a CPU torch's profiler reports every allocation, so the figure is the same in every run; what
    the run frees of earlier tensors does not lower it. On a GPU the peak is that of torch's caching
    allocator.

    Args:
        device: cpu or cuda.
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    # of the profiler's library, which on a machine without GPU reports that as an error
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    events: Any = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    # The profiler knows the size of a tensor of before only if an earlier profile saw it made.
    sizes, held, peak = dict[int, int](), 0, 0
    for event in sorted(_allocations(events), key=lambda event: event.start_time_ns):
        block = event.extra_fields
        if block.alloc_size > 0:
            sizes[block.ptr] = block.alloc_size
            held += block.alloc_size
        else:
            held -= sizes.pop(block.ptr, 0)
        peak = max(peak, held)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    """The events among these, and within them, at which memory was allocated or freed."""
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from _allocations(event.children)


def peak_resident_bytes(run: Callable[[], object]) -> int:
    """The most by which the resident set of this process grows during a run.

    A thread looks at it every 2 ms. The figure includes what the allocator keeps for later. With
    glibc, free memory that it kept before goes back to the system first, so that the run does not
    use it uncounted.
    """
    return_freed_memory()
    process, ended = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not ended.wait(SAMPLING_SECONDS):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
        most = max(most, process.memory_info().rss)
    finally:
        ended.set()
        watcher.join()
    return most - before
