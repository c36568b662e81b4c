"""What a process does with memory that it frees: settings of glibc.

Other C libraries are left as they are.
"""

import contextlib
import ctypes

# parameters of mallopt, and their largest values
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGEST_MMAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, up to 2 GiB, for its next allocations.

    Each step of a training frees its activations. By default glibc gives such memory back, and the
    next step waits for the system to map and clear it page by page.
    """
    _call("mallopt", _MMAP_THRESHOLD, _LARGEST_MMAP)
    _call("mallopt", _TRIM_THRESHOLD, _LARGEST_TRIM)


def return_freed_memory() -> None:
    """Give the memory that this process has freed and kept back to the system, once."""
    _call("malloc_trim", 0)


def _call(function: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)
