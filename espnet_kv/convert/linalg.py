"""Square roots of moments that may be singular, singular vectors with a fixed sign, a rotation."""

import math

import torch
from torch import Tensor

# Smallest eigenvalue of a moment, relative to its largest. Smaller eigenvalues are raised to it,
# because they consist of rounding errors.
CUT_OFF = 1e-12


def symmetric_root(moment: Tensor) -> Tensor:
    """Symmetric square root of moments (..., n, n), with eigenvalues raised to the cut-off."""
    values, vectors = torch.linalg.eigh(moment)
    values = torch.maximum(values, CUT_OFF * values[..., -1:]).clamp(min=0)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.transpose(-1, -2)


def left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """(n, rank): the first left singular vectors of (n, m), padded with zeros."""
    vectors = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    # the sign depends on the SVD routine; a positive largest entry makes results reproducible
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.nn.functional.pad(vectors * signs, (0, rank - vectors.size(1)))


def hartley(size: int) -> Tensor:
    """(n, n) matrix of the discrete Hartley transform, in float64: symmetric and orthogonal.

    Its entries are at most sqrt(2 / n), so it spreads one large number over all n.
    """
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi / size * (torch.outer(index, index) % size)
    return (angle.cos() + angle.sin()) / math.sqrt(size)
