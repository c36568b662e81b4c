"""Peak memory, by torch's allocator and by the operating system."""

import time

import torch

from espnet_kv.profile import memory


class TestMemory:
    SIZE = 64 * 2**20

    def run(self):
        x = torch.ones(self.SIZE // 4)
        y = torch.ones(self.SIZE // 8)
        del x
        return torch.ones(self.SIZE // 8) + y[0]

    def test_the_peak_of_tensors_is_exact(self):
        del [torch.ones(2 * self.SIZE // 4)][:]  # an earlier and higher peak
        small = 64 * 4  # numbers that are added, and their padding
        assert 0 <= memory.peak_bytes("cpu", self.run) - 3 * self.SIZE // 2 <= small

    def test_the_peak_of_the_process_is_near_it(self):
        def hold():
            x = torch.ones(self.SIZE // 4)
            time.sleep(0.5)  # the thread that looks may have to wait for a core
            return x.sum()

        assert memory.peak_resident_bytes(hold) > 0.9 * self.SIZE
