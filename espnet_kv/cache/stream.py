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

# slots that an unbounded left context begins with, in chunks; they double when full
FIRST_CHUNKS = 16


@dataclass(frozen=True)
class ModuleBytes:
    """Bytes of one module's state.

    Attributes:
        kind: attention or conv.
        nbytes: held now, read off the storage.
        nbytes_analytic: the same computed from the module's configuration.
        capacity_bytes: allocated.
    """

    kind: str
    nbytes: int
    nbytes_analytic: int
    capacity_bytes: int


@dataclass(eq=False)
class EncoderState:
    """Everything that an encoder keeps of a batch of streams between two chunks.

    A state is made by `encoder.init_state`, changed in place by `encoder.forward_chunk`, and can be
    pickled. It must not be used by two threads at once; different states of one encoder may.

    Attributes:
        chunk_size: C, frames after subsampling in a chunk.
        left_chunks: chunks before its own that a frame attends to; -1: all.
        cache_dtype: of what is stored; None: the model's own type.
        dtype: of the model.
        store: storage of the encoder's modules.
        places: place of each stream in the store.
        features: what is not encoded yet.
        frames: frames encoded so far, of each stream.
        held: frames that the next chunk may attend to, of each stream.
        emitted: frames that the last call returned, of each stream.
        finished: whether each stream had its last piece.
        footprints: of the encoder's modules, by their `state_index`.
        tables: projected relative positions; made at the next chunk where None.
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
        """These streams, in this order, as a state of their own.

        Streams may be left out, reordered, or listed twice, which forks them. Neither state changes
        with the other. Streams are copied only where less than half of the storage stays in use,
        or where both states are used afterwards.

        Args:
            rows: numbers of streams, each from 0 to B - 1, a number as often as wanted; none: a
                state of no streams, to which others can be joined.

        Raises:
            ValueError: rows is a mask or holds something else than whole numbers.
            IndexError: there is no such stream; negative numbers name none.
        """
        rows = self._checked(rows)
        selected = self._of(rows, self.store, [self.places[row] for row in rows])
        slots = selected._slots_needed
        if 2 * len(rows) * slots <= self.store.places * self.store.slots:
            selected._move_out(slots)
        return selected

    @staticmethod
    def join(parts: Sequence["EncoderState"]) -> "EncoderState":
        """The streams of all parts, in this order, in one batch.

        The streams of the largest part stay where they are if its storage has room; only the others
        are copied.

        Raises:
            ValueError: no parts, or parts of different encoders, chunk_size, left_chunks or
                cache_dtype.
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
        """Begin new streams in place of these; None: of all.

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
        """Let later chunks attend to no more than the newest `frames` frames.

        The sums of linear attention cannot forget.
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
        """Make sure that no other state sees what is written, and that places are 0 to B - 1.

        `forward_chunk` calls it. Streams that lie behind are moved into the places of streams that
        have left: dropping one of many streams moves one.
        """
        if any(other is not self for other in self.store.holders) or len(set(self.places)) < len(
            self.places
        ):
            self._move_out(self._slots_needed)
        behind = [row for row, place in enumerate(self.places) if place >= self.batch_size]
        if behind:
            taken = set(self.places)
            gaps = [place for place in range(self.batch_size) if place not in taken]
            self.store.copy_from(self.store, [self.places[row] for row in behind], gaps)
            for row, place in zip(behind, gaps, strict=True):
                self.places[row] = place

    def make_room(self, slots: int) -> None:
        """Have rings of at least `slots` slots, where the left context is unbounded."""
        while self.store.slots < slots:
            self.store.grow(2 * self.store.slots)

    def _move_out(self, slots: int) -> None:
        """Copy the streams into a store of their own."""
        store, places = self.store.resized(self.batch_size, slots), list(range(self.batch_size))
        store.copy_from(self.store, self.places, places)
        self.store.holders.discard(self)
        store.holders.add(self)
        self.store, self.places = store, places
        if self.tables is not None and self.tables.slots != slots:
            self.tables = None  # those of longer streams; others are made at the next chunk

    def _of(self, rows: Sequence[int], store: Store, places: list[int]) -> "EncoderState":
        """Some streams of this state in these places of a store."""
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
        """Numbers of streams as ints."""
        numbers = _whole_numbers(rows)
        if not all(0 <= row < self.batch_size for row in numbers):
            raise IndexError(f"streams {numbers} of a state of {self.batch_size}")
        return numbers

    @property
    def _slots_needed(self) -> int:
        """Slots that rings of these streams would be given."""
        if self.left_chunks >= 0:
            return self.store.slots
        slots = min(self.store.slots, FIRST_CHUNKS * self.chunk_size)
        while slots < max(self.frames, default=0):
            slots *= 2
        return slots

    @property
    def encoder(self) -> Any:
        """The encoder that made the state; None: it was unpickled, or the encoder is gone."""
        return None if self.owner is None else self.owner()

    def _fits(self, other: Self) -> bool:
        """Whether streams of the two may share storage."""
        same = self.encoder is None or other.encoder is None or self.encoder is other.encoder
        return (
            same
            and (self.chunk_size, self.left_chunks) == (other.chunk_size, other.left_chunks)
            and self.store.layout == other.store.layout
        )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the streams alone, without the encoder.

        The first encoder of the same layout that is given the state afterwards becomes its own.
        """
        own = self._of(range(self.batch_size), self.store, self.places)
        own._move_out(self._slots_needed)
        return vars(own) | {"owner": None, "tables": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        self.store.holders.add(self)

    @property
    def modules(self) -> list[ModuleBytes]:
        """Bytes of the encoder's modules, by their `state_index`."""
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
        """Bytes held now: frames in reach, sums, features that wait. Read off the storage."""
        return sum(self.nbytes_by_kind().values())

    @property
    def nbytes_analytic(self) -> int:
        """What nbytes should be, computed from the configuration."""
        waiting = sum(self.features.lengths) * self.features.size * self.dtype.itemsize
        return waiting + sum(module.nbytes_analytic for module in self.modules)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all storage behind the state, in use or not, position tables included."""
        return sum(self.capacity_by_kind().values())

    def nbytes_by_kind(self) -> dict[str, int]:
        """nbytes apart: {"attention": .., "conv": .., "input": ..}."""
        own = {kind: sum(m.nbytes for m in self.modules if m.kind == kind) for kind in KINDS}
        return own | {"input": self.features.nbytes}

    def capacity_by_kind(self) -> dict[str, int]:
        """capacity_bytes apart: the kinds of `nbytes_by_kind`, and "position".

        position: tables of relative positions, which streams of an encoder with the same settings
        share.
        """
        own = {
            kind: sum(s.capacity_bytes for s in self.store.states if s.kind == kind)
            for kind in KINDS
        }
        tables = 0 if self.tables is None else self.tables.nbytes
        return own | {"input": self.features.nbytes, "position": tables}


def _whole_numbers(rows: Any) -> list[int]:
    """Numbers of streams as plain integers: of a sequence, an array or a tensor."""
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
