"""Size of a module's state in bytes, computed from the module's configuration.

No tensor is read here. The results are compared with the storage of real states
(`espnet_kv.cache.state`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from espnet_kv.cache.codec import scales

BITS = {"fp64": 64, "fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
SCALE_BYTES = 2  # of a bfloat16
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def vector_bytes(numbers: int, cache_dtype: str) -> int:
    """Bytes of one stored vector of `numbers` numbers, including the scales of integers.

    Args:
        cache_dtype: fp64, fp32, fp16, bf16, int8 or int4.
    """
    bits = BITS[cache_dtype]
    return -(-numbers * bits // 8) + (scales(numbers, bits) * SCALE_BYTES if bits <= 8 else 0)


@dataclass(frozen=True)
class Footprint:
    """Contents of one module's state for one stream.

    Attributes:
        frame: (count, size) of the vectors stored per frame.
        constant: (count, size) of the vectors stored per stream.
        sums: numbers stored per stream in float32, or in the model's type if that is wider;
            independent of cache_dtype.
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
            dtype: the model's type, which determines the type of the sums.
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
            held: number of frames of each stream.
            cache_dtype: None: the model's type.
            dtype: the model's type.
        """
        stored = NAMES[dtype] if cache_dtype is None else cache_dtype
        constant = len(held) * self.constant_bytes(stored, dtype)
        return sum(held) * self.frame_bytes(stored) + constant
