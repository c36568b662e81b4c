"""Roots of moments that may be singular, and singular vectors that come out alike everywhere."""

import torch
from torch import Tensor

# Directions in which the data has less than this part of its largest variance count as if they
# had so much: round-off would decide about them otherwise.
CUT_OFF = 1e-12


def symmetric_root(moment: Tensor) -> Tensor:
    """The symmetric square root of moments (..., n, n), eigenvalues no less than the cut-off."""
    values, vectors = torch.linalg.eigh(moment)
    values = torch.maximum(values, CUT_OFF * values[..., -1:]).clamp(min=0)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.transpose(-1, -2)


def left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """(n, rank): the first left singular vectors of (n, m), zeros where there are no more."""
    vectors = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    # the sign is the SVD's choice: largest entry positive, for the same result everywhere
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.nn.functional.pad(vectors * signs, (0, rank - vectors.size(1)))
