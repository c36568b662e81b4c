"""ESPnet's positional encodings, computed on demand, because a table would grow with the stream."""

import math
from typing import Any

import torch
from torch import Tensor


def sinusoid(positions: Tensor, size: int) -> Tensor:
    """Sinusoidal encoding (..., size) of positions (...), as ESPnet's (arXiv 1706.03762, 3.5)."""
    rates = torch.exp(
        torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
        * -(math.log(10000.0) / size)
    )
    angles = positions.float()[..., None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :size]


def relative(first: int, last: int, size: int, device: torch.device) -> Tensor:
    """(1, first - last + 1, size): encodings of the distances first, first - 1, ..., last.

    The order is that of ESPnet's RelPositionalEncoding.
    """
    return sinusoid(torch.arange(first, last - 1, -1, device=device), size)[None]


def at_positions(encoding: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Apply ESPnet's PositionalEncoding or ScaledPositionalEncoding at the given positions.

    Args:
        encoding: the module.
        x: (B, T, D), or (N, D) at one position.
        positions: broadcastable to the shape of x without D.
    """
    absolute = sinusoid(positions, x.size(-1)).to(x.dtype)
    if hasattr(encoding, "alpha"):  # ScaledPositionalEncoding
        return x + encoding.alpha * absolute
    return x * encoding.xscale + absolute
