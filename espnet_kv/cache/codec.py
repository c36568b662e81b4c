"""Codecs for `cache_dtype`, the number format of the vectors in a cache.

A vector is the last dimension of a stored tensor, e.g. the key of one head and frame, or the
latent of a frame.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_kv.errors import ConfigError

FLOATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
INTEGERS = {"int8": 8, "int4": 4}
LARGEST_HALF = 65504  # largest finite float16
GROUP = 32
"""Numbers that share a scale of 4-bit integers. With one scale for a whole vector of normally
distributed numbers the squared error is 1.5 times as large for 128 of them, 2.3 times for 1536."""


class Codec(ABC):
    """Encodes tensors (..., size) into stored tensors, each (..., width), and back.

    Args:
        size: numbers in a vector.
    """

    def __init__(self, size: int):
        self.size = size

    @property
    @abstractmethod
    def layout(self) -> list[tuple[int, torch.dtype]]:
        """(width, dtype) of each stored tensor."""

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """(..., size) -> the stored tensors."""

    @abstractmethod
    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The stored tensors -> (..., size)."""


class FloatCodec(Codec):
    """Stores vectors as a floating-point type, rounded where it is narrower than the model's."""

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__(size)
        self.dtype = dtype

    @property
    def layout(self) -> list[tuple[int, torch.dtype]]:
        return [(self.size, self.dtype)]

    def encode(self, x: Tensor) -> list[Tensor]:
        return [_cast(x, self.dtype)]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return _cast(parts[0], dtype)


class IntegerCodec(Codec):
    """Symmetric integers with bfloat16 scales: one per vector for 8 bits, per GROUP for 4 bits.

    Two integers of 4 bits share a byte.
    """

    def __init__(self, size: int, bits: int):
        super().__init__(size)
        self.bits = bits
        self.top = 2 ** (bits - 1) - 1
        self.groups = scales(size, bits)

    @property
    def layout(self) -> list[tuple[int, torch.dtype]]:
        codes = (self.size, torch.int8) if self.bits == 8 else (-(-self.size // 2), torch.uint8)
        return [codes, (self.groups, torch.bfloat16)]

    def encode(self, x: Tensor) -> list[Tensor]:
        x = x.float()
        # the lower bound prevents a division by zero for a vector of zeros
        scale = (self._largest(x) / self.top).clamp(min=1e-30).bfloat16()
        codes = (x / self._spread(scale.float())).round().clamp(-self.top, self.top)
        if self.bits == 8:
            return [codes.to(torch.int8), scale]
        codes = (F.pad(codes, (0, self.size % 2)) + 8).to(torch.uint8)
        pairs = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return [pairs, scale]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = parts
        # for vectors near the largest float16, the rounded scale exceeds the float16 range
        wide = torch.float32 if dtype == torch.float16 else dtype
        scale = self._spread(scale.to(wide))
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., : self.size]
            return _cast((codes.to(wide) - 8) * scale, dtype)
        return _cast(codes.to(wide) * scale, dtype)

    def _largest(self, x: Tensor) -> Tensor:
        """Largest absolute value of each group, (..., groups)."""
        if self.groups == 1:
            return x.abs().amax(dim=-1, keepdim=True)
        padded = F.pad(x.abs(), (0, self.groups * GROUP - self.size))
        return padded.unflatten(-1, (self.groups, GROUP)).amax(dim=-1)

    def _spread(self, scale: Tensor) -> Tensor:
        """(..., groups) -> one for each number, or one for all."""
        return scale if self.groups == 1 else scale.repeat_interleave(GROUP, -1)[..., : self.size]


def scales(size: int, bits: int) -> int:
    """Number of scales of a vector of `size` integers."""
    return 1 if bits == 8 else -(-size // GROUP)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert, with values clamped to the float16 range; softmax would turn infinity into NaN."""
    if x.dtype == dtype:
        return x
    x = x.to(dtype)
    return x.clamp(-LARGEST_HALF, LARGEST_HALF) if dtype == torch.float16 else x


def build_codec(cache_dtype: str | None, size: int, model_dtype: torch.dtype) -> Codec:
    """Build the codec of `cache_dtype` (fp32, fp16, bf16, int8, int4; None: the model's type).

    Raises:
        ConfigError (a ValueError): unknown cache_dtype.
    """
    if cache_dtype is None:
        return FloatCodec(size, model_dtype)
    if cache_dtype in tuple(FLOATS):
        return FloatCodec(size, FLOATS[cache_dtype])
    if cache_dtype in tuple(INTEGERS):
        return IntegerCodec(size, INTEGERS[cache_dtype])
    raise ConfigError(
        f"cache_dtype: unknown {cache_dtype!r} (allowed: {', '.join([*FLOATS, *INTEGERS])})"
    )
