"""What every state of a stream can do, and what the states of an encoder have in common.

Every state serves a batch of streams that share nothing but the storage: they may be of different
ages, and be dropped from a running batch or joined to it.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

KINDS = ("attention", "conv", "input")


@dataclass(frozen=True)
class StateSpec:
    """What the states of an encoder have in common.

    batch_size: B. slots: N, of a ring of frames. cache_dtype: see `espnet_kv.codec`. dtype,
    device: the model's own.
    """

    batch_size: int
    slots: int
    cache_dtype: str | None
    dtype: torch.dtype
    device: torch.device


class State(ABC):
    """What one module keeps of each stream.

    A subclass has an `append` of its own, which takes what is new and gives what the module needs.

    Attributes:
        kind: under which head its bytes are counted.
        tensors: the storage, streams first.
    """

    kind: ClassVar[str]
    tensors: list[Tensor]

    def trim(self, frames: int) -> None:  # noqa: B027
        """Forget all but the newest `frames` frames; a state of constant size has none to spare."""

    def select(self, rows: Sequence[int]) -> Self:
        """These streams, in this order, as a state of their own."""
        selected = copy.copy(self)
        selected.tensors = [tensor[list(rows)] for tensor in self.tensors]
        return selected

    def join(self, others: Sequence[Self]) -> Self:
        """These streams and the others', as a state of their own."""
        joined = copy.copy(self)
        parts = zip(*(state.tensors for state in (self, *others)), strict=True)
        joined.tensors = [torch.cat(part) for part in parts]
        return joined

    def to(self, device: torch.device) -> Self:
        """Move the storage; returns self."""
        self.tensors = [tensor.to(device) for tensor in self.tensors]
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of what is held now, read off the storage."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    @abstractmethod
    def nbytes_analytic(self) -> int:
        """What nbytes should be, by arithmetic on the sizes of the model."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the storage, whether in use or not."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)
