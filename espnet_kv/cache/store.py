"""Storage that the streams of one or more states share, a place for each stream.

`EncoderState.select` and `join` give new states without copying the streams that stay: the new
state refers to the places of the old one. A state that is about to write first makes sure that no
other living state refers to its storage, and copies its streams out where one does.

Shape letters: P places, N slots.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from espnet_kv.cache.state import FrameState, State

# a batch that streams join takes a quarter more places than it needs, so that the next ones that
# join copy nothing but themselves
SPARE = 4


class Store:
    """The states of an encoder's modules for P streams.

    Attributes:
        states: of the modules, by their `state_index`.
        places: P.
        slots: N of the rings.
        holders: the living states that refer to places here.
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
        """Shapes and types of the storage apart from P and N: equal where streams fit."""
        return [state.layout for state in self.states]

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the storage, in use or not."""
        return sum(state.capacity_bytes for state in self.states)

    def free(self) -> list[int]:
        """Places that no living state refers to."""
        taken = {place for holder in self.holders for place in holder.places}
        return [place for place in range(self.places) if place not in taken]

    def copy_from(self, source: "Store", theirs: Sequence[int], ours: Sequence[int]) -> None:
        """Copy streams from places of another store, or of this one, to places here."""
        for state, other in zip(self.states, source.states, strict=True):
            state.copy_from(other, theirs, ours)

    def resized(self, places: int, slots: int) -> "Store":
        """An empty store for the same modules."""
        return Store([s.resized(places, slots) for s in self.states], places, slots)

    def grow(self, slots: int) -> None:
        """Make room for more frames in rings that have not wrapped."""
        for state in self.states:
            if isinstance(state, FrameState):
                state.grow(slots)
        self.slots = slots

    def clear(self, places: Sequence[int]) -> None:
        """Make new streams in these places."""
        for state in self.states:
            state.clear(places)

    def to(self, device: torch.device) -> None:
        """Move the storage."""
        for state in self.states:
            state.to(device)
