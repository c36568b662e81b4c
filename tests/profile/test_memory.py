"""Peak memory, by torch's allocator and by the operating system."""

import time

import torch

from espnet_kv.profile import memory


class TestMemory:
    SIZE = 64 * 2**20
    BLOCK = 16 * 2**20

    def run(self):
        x = torch.ones(self.SIZE // 4)
        y = torch.ones(self.SIZE // 8)
        del x
        return torch.ones(self.SIZE // 8) + y[0]

    def test_the_peak_of_tensors_is_exact(self):
        del [torch.ones(2 * self.SIZE // 4)][:]  # an earlier and higher peak
        small = 64 * 4  # numbers that are added, and their padding
        assert 0 <= memory.peak_bytes("cpu", self.run) - 3 * self.SIZE // 2 <= small

    def test_what_a_run_frees_of_an_earlier_one_changes_nothing(self):
        """The profiler knows the sizes of blocks of the runs before that it has measured."""
        held = [torch.ones(self.SIZE // 4)]

        def replace():
            held.clear()
            held.append(torch.ones(self.SIZE // 4))

        assert {memory.peak_bytes("cpu", replace) for _ in range(3)} == {self.SIZE}

    def hold(self):
        x = [torch.ones(self.BLOCK // 4) for _ in range(self.SIZE // self.BLOCK)]
        time.sleep(0.5)  # the thread that looks may have to wait for a core
        return sum(x)

    def test_the_peak_of_the_process_is_near_it(self):
        assert memory.peak_resident_bytes(self.hold) > 0.9 * self.SIZE

    def test_the_peak_of_the_process_counts_memory_that_was_used_before(self):
        torch.ones(self.BLOCK // 2)  # glibc keeps smaller blocks than the largest it has freed
        blocks = [torch.ones(self.BLOCK // 4) for _ in range(2 * self.SIZE // self.BLOCK)]
        above = torch.ones(self.BLOCK // 4)  # so that the memory below it is not given back
        blocks.clear()
        assert memory.peak_resident_bytes(self.hold) > 0.9 * self.SIZE, above
