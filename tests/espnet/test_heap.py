"""A process that trains on a CPU takes the memory of its steps from the system once."""

import platform
import subprocess
import sys

import pytest

# a step allocates, fills and frees four blocks of 20 MiB; page faults of three steps
SCRIPT = """
import ctypes, resource, sys
from espnet_kv.heap import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 20 * 2**20

def step():
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_not_taken_from_the_system_again():
    def faults(mode: str) -> int:
        given = [sys.executable, "-c", SCRIPT, mode]
        return int(subprocess.run(given, check=True, capture_output=True, text=True).stdout)

    assert faults("keep") < faults("default") / 10
