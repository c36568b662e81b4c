"""Bytes that a module's state takes, computed from the module's configuration alone.

No tensor is read here: the figures are compared with those of live states, which are read off
their storage (`espnet_kv.cache.state`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BITS = {"fp64": 64, "fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
SCALE_BYTES = 2  # of a vector of integers
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def vector_bytes(numbers: int, cache_dtype: str) -> int:
    """Bytes of one stored vector of so many numbers; integers come with a scale.

    Args:
        cache_dtype: fp64, fp32, fp16, bf16, int8 or int4.
    """
    bits = BITS[cache_dtype]
    return -(-numbers * bits // 8) + (SCALE_BYTES if bits <= 8 else 0)


@dataclass(frozen=True)
class Footprint:
    """What one module stores of one stream.

    Attributes:
        frame: (count, size) of the vectors stored for every frame.
        constant: (count, size) of the vectors stored whatever the length of the stream.
        sums: numbers stored whatever the length, in float32 or the model's type if that is wider;
            cache_dtype does not apply to them.
    """

    frame: Sequence[tuple[int, int]] = ()
    constant: Sequence[tuple[int, int]] = ()
    sums: int = 0

    def frame_bytes(self, cache_dtype: str) -> int:
        """Bytes of one frame."""
        return sum(count * vector_bytes(size, cache_dtype) for count, size in self.frame)

    def constant_bytes(self, cache_dtype: str, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that do not depend on the number of frames.

        Args:
            dtype: the model's type, which decides that of the sums.
        """
        wide = torch.promote_types(dtype, torch.float32).itemsize
        vectors = sum(count * vector_bytes(size, cache_dtype) for count, size in self.constant)
        return vectors + self.sums * wide

    def nbytes(
        self,
        held: Sequence[int],
        cache_dtype: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of some streams.

        Args:
            held: frames that each stream holds.
            cache_dtype: None: the model's type.
            dtype: the model's type.
        """
        stored = NAMES[dtype] if cache_dtype is None else cache_dtype
        constant = len(held) * self.constant_bytes(stored, dtype)
        return sum(held) * self.frame_bytes(stored) + constant
