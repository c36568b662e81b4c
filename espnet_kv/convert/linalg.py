"""Symmetric roots and norms of moments that may be singular."""

import torch
from torch import Tensor

# Directions in which the data has less than this part of its largest variance count as if they
# had so much: round-off would decide about them otherwise.
CUT_OFF = 1e-12


def symmetric_root(moment: Tensor, cut_off: float = CUT_OFF) -> Tensor:
    """The symmetric square root of a moment (..., n, n), eigenvalues no less than the cut-off.

    A moment of zeros gives the identity: nothing is known, so every direction counts alike.
    """
    values, vectors = torch.linalg.eigh(moment)
    largest = values[..., -1:].clamp(min=0)
    values = torch.where(largest > 0, values.clamp(min=cut_off * largest), 1.0)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.transpose(-1, -2)
