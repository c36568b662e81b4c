"""The runner that feeds encoders piece by piece, also for tests of new attentions."""

from collections.abc import Iterable
from typing import Any

import torch
from small_encoders import ATTENTIONS, FEATURES, assert_close, build, encode
from torch import Tensor, nn

from espnet_kv.cache import EncoderState, FrameState

STREAMED: dict[str, dict[str, Any]] = ATTENTIONS | {
    "mha-input": {"attention_type": "mha", "attention_conf": {"cache": "input"}},
    "decay": {"attention_type": "linear", "attention_conf": {"decay": 0.9}},
}


def streaming(name: str, chunk: int = 4, left: int = 2, **conf: Any) -> nn.Module:
    """A small encoder that can stream."""
    return build(name, causal=True, chunk_size=chunk, left_chunks=left, **conf)


def utterances(*frames: int, features: int = FEATURES) -> list[Tensor]:
    """Features for this many encoder frames (and up to three input frames more)."""
    return [torch.randn(7 + 4 * (n - 1) + n % 4, features) for n in frames]


def poison(state: EncoderState, value: float) -> EncoderState:
    """Fill the rings with `value`, to detect reads of slots that were not written."""
    for module_state in state.store.states:
        if isinstance(module_state, FrameState):
            for tensor in module_state.tensors:
                if tensor.is_floating_point():
                    tensor.fill_(value)
    return state


class Feeder:
    """Feeds utterances to the streams of one state and collects their outputs.

    Slots begin as NaN if streams have equal lengths, because then only written slots are read.
    Otherwise empty slots of shorter streams are read and masked, so they must begin as numbers.
    """

    def __init__(self, encoder: nn.Module, xs: list[Tensor], empty: float = torch.nan, **conf: Any):
        self.encoder, self.xs = encoder, xs
        self.state = poison(encoder.init_state(len(xs), **conf), empty)
        self.fed = [0] * len(xs)
        self.out: list[list[Tensor]] = [[] for _ in xs]

    @property
    def done(self) -> bool:
        return all(fed >= len(x) for fed, x in zip(self.fed, self.xs, strict=True))

    def feed(self, sizes: Iterable[int]) -> None:
        """Feed the next sizes[b] frames, or the rest, to stream b."""
        pairs = zip(self.xs, self.fed, sizes, strict=True)
        pieces = [x[fed : fed + size] for x, fed, size in pairs]
        lengths = [len(piece) for piece in pieces]
        self.fed = [fed + n for fed, n in zip(self.fed, lengths, strict=True)]
        final = [fed >= len(x) for fed, x in zip(self.fed, self.xs, strict=True)]
        # values after the end of a piece are arbitrary
        xs = torch.full((len(pieces), max(lengths), self.xs[0].size(1)), torch.nan)
        for row, piece in zip(xs, pieces, strict=True):
            row[: len(piece)] = piece
        xs = xs.to(self.xs[0].dtype)
        ys, self.state = self.encoder.forward_chunk(xs, self.state, final, lengths)
        assert ys.size(1) == max(self.state.emitted)
        for gathered, y, n in zip(self.out, ys, self.state.emitted, strict=True):
            gathered.append(y[:n])

    def run(self, size: int) -> "Feeder":
        """Feed everything in pieces of this size."""
        while not self.done:
            self.feed([size] * len(self.xs))
        return self

    def select(self, rows: list[int]) -> None:
        """Drop or reorder streams."""
        self.state = self.state.select(rows)
        for name in ("xs", "fed", "out"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def join(self, other: "Feeder") -> None:
        """Take another feeder's streams into the batch."""
        self.state = EncoderState.join([self.state, other.state])
        for name in ("xs", "fed", "out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def check(self, tolerance: float = 1e-5) -> None:
        """Check that every stream equals one pass over its utterance."""
        chunks = {"chunk_size": self.state.chunk_size, "left_chunks": self.state.left_chunks}
        for x, pieces in zip(self.xs, self.out, strict=True):
            with self.encoder.chunks(**chunks):
                expected = encode(self.encoder, x)
            assert_close(torch.cat(pieces), expected, tolerance)


def reachable(root: Any) -> dict[int, Tensor]:
    """Every tensor that an object keeps alive through its attributes, lists and dicts."""
    found, seen, todo = {}, set(), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple):
            todo += thing
        elif hasattr(thing, "__dict__"):
            todo += [value for name, value in vars(thing).items() if name != "owner"]
    return found
