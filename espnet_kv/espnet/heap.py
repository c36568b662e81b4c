"""The heap of a process that trains on a CPU."""

import contextlib
import ctypes

# parameters of glibc's mallopt, and their largest values
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGEST_MMAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, up to 2 GiB, for its next allocations.

    Each step of a training frees its activations. By default glibc gives such memory back, and the
    next step waits for the system to map and clear it page by page. Other C libraries are left as
    they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM)
