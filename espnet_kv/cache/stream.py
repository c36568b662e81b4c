"""The state of a batch of streams through an encoder.

Shape letters: B streams, N slots, C chunk_size.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from espnet_kv.cache.features import Features
from espnet_kv.cache.footprint import Footprint
from espnet_kv.cache.position_table import PositionTables
from espnet_kv.cache.state import KINDS
from espnet_kv.cache.store import SPARE, Store

# initial capacity in chunks with an unbounded left context; it doubles when full
FIRST_CHUNKS = 16


@dataclass(frozen=True)
class ModuleBytes:
    """Bytes of one module's state.

    Attributes:
        kind: attention or conv.
        nbytes: bytes in use, from the storage.
        nbytes_analytic: bytes in use, computed from the module's configuration.
        capacity_bytes: bytes allocated.
    """

    kind: str
    nbytes: int
    nbytes_analytic: int
    capacity_bytes: int


@dataclass(eq=False)
class EncoderState:
    """State of an encoder for a batch of streams between two chunks.

    `encoder.init_state` creates it and `encoder.forward_chunk` changes it in place. It can be
    pickled. Two threads may use different states of one encoder, but not the same state.

    Attributes:
        chunk_size: C, frames after subsampling in a chunk.
        left_chunks: number of chunks of left context; -1: all.
        cache_dtype: number format of the cache; None: the model's type.
        dtype: type of the model.
        store: storage of the encoder's modules.
        places: place of each stream in the store.
        features: features that are not encoded yet.
        frames: frames of each stream encoded so far.
        held: frames of each stream that the next chunk may attend to.
        emitted: frames of each stream returned by the last call.
        finished: whether each stream has ended.
        footprints: footprints of the encoder's modules, by `state_index`.
        tables: projected relative positions; None: computed at the next chunk.
        owner: reference to the encoder; None: any encoder of the same layout may take the state.
    """

    chunk_size: int
    left_chunks: int
    cache_dtype: str | None
    dtype: torch.dtype
    store: Store
    places: list[int]
    features: Features
    frames: list[int]
    held: list[int]
    emitted: list[int]
    finished: list[bool]
    footprints: Sequence[Footprint]
    tables: PositionTables | None = None
    owner: weakref.ref | None = None

    def __post_init__(self) -> None:
        self.store.holders.add(self)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.frames)

    @property
    def slots(self) -> int:
        """N of the rings."""
        return self.store.slots

    def select(self, rows: Iterable[int]) -> "EncoderState":
        """Return a new state with these streams in this order.

        Streams may be left out, reordered, or repeated, which forks them. The two states are
        independent. Streams are copied only if less than half of the storage stays in use, or if
        both states are used afterwards.

        Args:
            rows: stream numbers, each from 0 to B - 1. An empty sequence gives a state without
                streams, to which others can be joined.

        Raises:
            ValueError: rows is a mask or contains values that are not integers.
            IndexError: a number is negative, or B or more.
        """
        rows = self._checked(rows)
        selected = self._subset(rows, self.store, [self.places[row] for row in rows])
        slots = selected._slots_needed
        if 2 * len(rows) * slots <= self.store.places * self.store.slots:
            selected._copy_to_own_store(slots)
        return selected

    @staticmethod
    def join(parts: Sequence["EncoderState"]) -> "EncoderState":
        """Join the streams of all parts, in this order, into one state.

        If the storage of the largest part has room, only the streams of the others are copied.

        Raises:
            ValueError: `parts` is empty, or the parts have different encoders, chunk_size,
                left_chunks or cache_dtype.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts: there is no state to join")
        for part in parts[1:]:
            if not parts[0]._fits(part):
                raise ValueError(
                    "join: states of different encoders, chunk_size, left_chunks or cache_dtype "
                    "do not join"
                )
        host = max(parts, key=lambda part: part.store.places * part.store.slots)
        total = sum(part.batch_size for part in parts)
        slots = max(part._slots_needed for part in parts)
        alone = sum(part.store is host.store for part in parts) == 1
        free = host.store.free() if alone else []
        if len(free) + host.batch_size < total or host.store.slots < slots:
            spare = host.store.places + host.store.places // SPARE
            store = host.store.resized(max(total, spare), slots)
            free, stays = list(range(total)), None
        else:
            store, stays = host.store, host
        places: list[int] = []
        for part in parts:
            if part is stays:
                places += part.places
                continue
            new, free = free[: part.batch_size], free[part.batch_size :]
            store.copy_from(part.store, part.places, new)
            places += new
        owner = next((part.owner for part in parts if part.encoder is not None), None)
        made = (part.tables for part in parts if part.tables is not None)
        tables = next((tables for tables in made if tables.slots == store.slots), None)
        return EncoderState(
            host.chunk_size,
            host.left_chunks,
            host.cache_dtype,
            host.dtype,
            store,
            places,
            Features(host.features.size, [t for part in parts for t in part.features.tensors]),
            [n for part in parts for n in part.frames],
            [n for part in parts for n in part.held],
            [n for part in parts for n in part.emitted],
            [done for part in parts for done in part.finished],
            host.footprints,
            tables,
            owner,
        )

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Replace these streams by new ones; None: all streams.

        Raises:
            IndexError, ValueError: see `select`.
        """
        rows = range(self.batch_size) if rows is None else self._checked(rows)
        self.claim()
        self.store.clear([self.places[row] for row in rows])
        for row in rows:
            self.frames[row] = self.held[row] = self.emitted[row] = 0
            self.finished[row] = False
            self.features.tensors[row] = self.features.tensors[row][:0].clone()

    def trim(self, frames: int) -> None:
        """Limit the left context of later chunks to the newest `frames` frames.

        This has no effect on the sums of linear attention.
        """
        self.held = [min(held, frames) for held in self.held]

    def to(self, device: torch.device | str) -> "EncoderState":
        """Move the storage; returns self."""
        device = torch.device(device)
        self.claim()
        self.store.to(device)
        self.features.tensors = [tensor.to(device) for tensor in self.features.tensors]
        self.tables = None
        return self

    def claim(self) -> None:
        """Make the storage exclusive to this state, and the places 0 to B - 1.

        `forward_chunk` calls this before it writes. Streams in places from B on are moved to free
        places below B, so that dropping one of many streams moves only one.
        """
        if any(other is not self for other in self.store.holders) or len(set(self.places)) < len(
            self.places
        ):
            self._copy_to_own_store(self._slots_needed)
        behind = [row for row, place in enumerate(self.places) if place >= self.batch_size]
        if behind:
            taken = set(self.places)
            gaps = [place for place in range(self.batch_size) if place not in taken]
            self.store.copy_from(self.store, [self.places[row] for row in behind], gaps)
            for row, place in zip(behind, gaps, strict=True):
                self.places[row] = place

    def make_room(self, slots: int) -> None:
        """Enlarge the rings to at least `slots` slots, for an unbounded left context."""
        while self.store.slots < slots:
            self.store.grow(2 * self.store.slots)

    def _copy_to_own_store(self, slots: int) -> None:
        """Copy the streams to a new store."""
        store, places = self.store.resized(self.batch_size, slots), list(range(self.batch_size))
        store.copy_from(self.store, self.places, places)
        self.store.holders.discard(self)
        store.holders.add(self)
        self.store, self.places = store, places
        if self.tables is not None and self.tables.slots != slots:
            self.tables = None  # computed again at the next chunk

    def _subset(self, rows: Sequence[int], store: Store, places: list[int]) -> "EncoderState":
        """A state of some of these streams, in these places of a store."""
        selected = object.__new__(EncoderState)
        vars(selected).update(
            vars(self),
            store=store,
            places=places,
            features=self.features.select(rows),
            frames=[self.frames[row] for row in rows],
            held=[self.held[row] for row in rows],
            emitted=[self.emitted[row] for row in rows],
            finished=[self.finished[row] for row in rows],
        )
        store.holders.add(selected)
        return selected

    def _checked(self, rows: Iterable[Any]) -> list[int]:
        """Stream numbers as ints in the range of this state."""
        numbers = _stream_numbers(rows)
        if not all(0 <= row < self.batch_size for row in numbers):
            raise IndexError(f"streams {numbers} of a state of {self.batch_size}")
        return numbers

    @property
    def _slots_needed(self) -> int:
        """Slots that a new store of these streams needs."""
        if self.left_chunks >= 0:
            return self.store.slots
        slots = min(self.store.slots, FIRST_CHUNKS * self.chunk_size)
        while slots < max(self.frames, default=0):
            slots *= 2
        return slots

    @property
    def encoder(self) -> Any:
        """The encoder of this state; None: the state was unpickled, or the encoder was deleted."""
        return None if self.owner is None else self.owner()

    def _fits(self, other: Self) -> bool:
        """Whether the streams of both states may share storage."""
        same = self.encoder is None or other.encoder is None or self.encoder is other.encoder
        return (
            same
            and (self.chunk_size, self.left_chunks) == (other.chunk_size, other.left_chunks)
            and self.store.layout == other.store.layout
        )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the streams without the encoder.

        Afterwards the first encoder of the same layout that uses the state becomes its owner.
        """
        own = self._subset(range(self.batch_size), self.store, self.places)
        own._copy_to_own_store(self._slots_needed)
        return vars(own) | {"owner": None, "tables": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        self.store.holders.add(self)

    @property
    def modules(self) -> list[ModuleBytes]:
        """Bytes of the encoder's modules, by `state_index`."""
        pairs = zip(self.store.states, self.footprints, strict=True)
        return [
            ModuleBytes(
                state.kind,
                state.nbytes(self.held),
                footprint.nbytes(self.held, self.cache_dtype, self.dtype),
                state.capacity_bytes,
            )
            for state, footprint in pairs
        ]

    states = modules

    @property
    def nbytes(self) -> int:
        """Bytes in use, from the storage: visible frames, sums, and features not encoded yet."""
        return sum(self.nbytes_by_kind().values())

    @property
    def nbytes_analytic(self) -> int:
        """The expected value of `nbytes`, computed from the configuration."""
        waiting = sum(self.features.lengths) * self.features.size * self.dtype.itemsize
        return waiting + sum(module.nbytes_analytic for module in self.modules)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all allocated storage, including the position tables."""
        return sum(self.capacity_by_kind().values())

    def nbytes_by_kind(self) -> dict[str, int]:
        """`nbytes` by kind: {"attention": .., "conv": .., "input": ..}."""
        own = {kind: sum(m.nbytes for m in self.modules if m.kind == kind) for kind in KINDS}
        return own | {"input": self.features.nbytes}

    def capacity_by_kind(self) -> dict[str, int]:
        """`capacity_bytes` by kind: the kinds of `nbytes_by_kind`, and "position".

        position: tables of relative positions, shared by streams of an encoder with the same
        settings.
        """
        own = {
            kind: sum(s.capacity_bytes for s in self.store.states if s.kind == kind)
            for kind in KINDS
        }
        tables = 0 if self.tables is None else self.tables.nbytes
        return own | {"input": self.features.nbytes, "position": tables}


def _stream_numbers(rows: Any) -> list[int]:
    """Stream numbers as plain integers, from a sequence, an array or a tensor."""
    numbers = rows.tolist() if hasattr(rows, "tolist") else rows
    try:
        numbers = [row.item() if hasattr(row, "item") else row for row in numbers]
    except TypeError:
        raise ValueError(f"rows {rows!r}: give a sequence of stream numbers, e.g. [1]") from None
    if any(isinstance(row, bool) for row in numbers):
        way_out = "[n for n, keep in enumerate(mask) if keep]"
        raise ValueError(f"rows {numbers}: a mask names no streams; give numbers, e.g. {way_out}")
    if not all(isinstance(row, int) for row in numbers):
        raise ValueError(f"rows {numbers}: give whole numbers of streams, e.g. [2, 0]")
    return numbers
