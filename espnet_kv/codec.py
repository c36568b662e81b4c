"""cache_dtype: in what form a cache keeps the vectors that are put into it.

A vector is the last dimension of what is stored: a head's key of one frame, a frame's latent.
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


class Codec(ABC):
    """Turns tensors (..., size) into the tensors that are kept, each (..., its width), and back.

    Args:
        size: numbers in a vector.
    """

    def __init__(self, size: int):
        self.size = size

    @property
    @abstractmethod
    def layout(self) -> list[tuple[int, torch.dtype]]:
        """(width, dtype) of each kept tensor."""

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """(..., size) -> the kept tensors."""

    @abstractmethod
    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The kept tensors -> (..., size)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that one vector takes, by arithmetic."""


class FloatCodec(Codec):
    """Kept in a floating-point type, as it is or rounded to it."""

    def __init__(self, size: int, dtype: torch.dtype):
        super().__init__(size)
        self.dtype = dtype

    @property
    def layout(self) -> list[tuple[int, torch.dtype]]:
        return [(self.size, self.dtype)]

    def encode(self, x: Tensor) -> list[Tensor]:
        if (
            self.dtype == torch.float16
        ):  # beyond its range lies infinity, which softmax turns to NaN
            x = x.clamp(-65504, 65504)
        return [x if x.dtype == self.dtype else x.to(self.dtype)]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return parts[0] if self.dtype == dtype else parts[0].to(dtype)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class IntegerCodec(Codec):
    """Symmetric integers of 8 or 4 bits with one bfloat16 scale per vector; 4 bits go in pairs."""

    def __init__(self, size: int, bits: int):
        super().__init__(size)
        self.bits = bits
        self.top = 2 ** (bits - 1) - 1

    @property
    def layout(self) -> list[tuple[int, torch.dtype]]:
        codes = (self.size, torch.int8) if self.bits == 8 else (-(-self.size // 2), torch.uint8)
        return [codes, (1, torch.bfloat16)]

    def encode(self, x: Tensor) -> list[Tensor]:
        x = x.float()
        # the floor keeps silence from dividing by zero
        scale = (x.abs().amax(dim=-1, keepdim=True) / self.top).clamp(min=1e-30).bfloat16()
        codes = (x / scale.float()).round().clamp(-self.top, self.top)
        if self.bits == 8:
            return [codes.to(torch.int8), scale]
        codes = (F.pad(codes, (0, self.size % 2)) + 8).to(torch.uint8)
        pairs = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return [pairs, scale]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = parts
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., : self.size]
            return (codes.to(dtype) - 8) * scale.to(dtype)
        return codes.to(dtype) * scale.to(dtype)

    @property
    def nbytes(self) -> int:
        return (self.size if self.bits == 8 else -(-self.size // 2)) + 2


def build_codec(cache_dtype: str | None, size: int, model_dtype: torch.dtype) -> Codec:
    """The codec of `cache_dtype` (fp32, fp16, bf16, int8, int4; None: the model's own type).

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
