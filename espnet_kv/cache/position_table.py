"""Relative positions, projected by the attention modules.

Shape letters: H heads, d_k head size, N slots, C chunk_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PositionTables:
    """Projected relative positions for all chunks of a stream.

    They depend on the weights, N and C, and are computed at the first chunk. States of one
    encoder with the same settings share them.

    Attributes:
        slots: N.
        chunk_size: C.
        tables: (H, N+C-1, d_k) of each module, by `state_index`; None: the module has none.
    """

    slots: int
    chunk_size: int
    tables: Sequence[Tensor | None]

    def same_as(self, other: "PositionTables") -> bool:
        """Whether both hold equal numbers of the same types."""
        return all(
            a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
            for a, b in zip(self.tables, other.tables, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(t.untyped_storage().nbytes() for t in self.tables if t is not None)
