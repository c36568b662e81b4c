"""Taking the time of things, and summing times up."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from espnet_kv.profile.schema import Spread


def milliseconds(device: str, run: Callable[..., object], *operands: Any) -> float:
    """How long run(*operands) takes, the GPU's part included."""
    synchronize(device)
    begin = time.perf_counter()
    run(*operands)
    synchronize(device)
    return 1000 * (time.perf_counter() - begin)


def synchronize(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device != "cpu":
        torch.cuda.synchronize()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it no garbage is collected."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spread(times: Sequence[float]) -> Spread:
    """Mean and percentiles of at least one time."""
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    return Spread(mean=float(np.mean(times)), p50=float(p50), p95=float(p95), p99=float(p99))


def median(times: Sequence[float]) -> float:
    """Of at least one time."""
    return float(np.median(times))
