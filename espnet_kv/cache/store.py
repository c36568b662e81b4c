"""Storage shared by the streams of one or more states, with one place per stream.

`EncoderState.select` and `join` return new states without copying the streams that stay: the new
state refers to the places of the old one. Before a state writes, it copies its streams to a new
store if another live state refers to its storage (copy on write).

Shape letters: P places, N slots.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from espnet_kv.cache.state import FrameState, State

# `join` allocates one quarter more places than needed, so that later joins copy only new streams
SPARE = 4


class Store:
    """The states of an encoder's modules for P streams.

    Attributes:
        states: states of the modules, by `state_index`.
        places: P.
        slots: N of the rings.
        holders: live EncoderStates that refer to places of this store.
    """

    def __init__(self, states: Sequence[State], places: int, slots: int):
        self.states = list(states)
        self.places, self.slots = places, slots
        self.holders: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "holders"}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values, holders=weakref.WeakSet())

    @property
    def layout(self) -> list[tuple]:
        """Shapes and types of the storage without P and N; equal if streams can be copied."""
        return [state.layout for state in self.states]

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the allocated storage."""
        return sum(state.capacity_bytes for state in self.states)

    def free(self) -> list[int]:
        """Places that no live state refers to."""
        taken = {place for holder in self.holders for place in holder.places}
        return [place for place in range(self.places) if place not in taken]

    def copy_from(self, source: "Store", sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy streams from places `sources` of another or this store to places `targets`."""
        for state, other in zip(self.states, source.states, strict=True):
            state.copy_from(other, sources, targets)

    def resized(self, places: int, slots: int) -> "Store":
        """An empty store for the same modules."""
        return Store([s.resized(places, slots) for s in self.states], places, slots)

    def grow(self, slots: int) -> None:
        """Enlarge the rings, which must not have wrapped yet."""
        for state in self.states:
            if isinstance(state, FrameState):
                state.grow(slots)
        self.slots = slots

    def clear(self, places: Sequence[int]) -> None:
        """Start new streams in these places."""
        for state in self.states:
            state.clear(places)

    def to(self, device: torch.device) -> None:
        """Move the storage."""
        for state in self.states:
            state.to(device)
