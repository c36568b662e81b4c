"""What a decoder keeps while it searches: once per token, and once per utterance.

Tokens of all hypotheses lie side by side in one store per layer. A hypothesis is the list of its
slots, so choosing, dropping and forking hypotheses copies nothing of what is stored. When the store
is full, the tokens that no hypothesis lists any more make room.

Shape letters: B utterances, K hypotheses of each, N = B K, L tokens, M slots, T encoder frames.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espnet_kv.cache import FrameState, LinearState, StateSpec
from espnet_kv.step import Memory, Step

# slots that a store begins with; they double when what lives takes more than half
FIRST_SLOTS = 64


@dataclass(eq=False)
class Hypothesis:
    """A hypothesis as its search knows it.

    search: what it shares with the others. row: its utterance. path: (L,) the slots of its tokens,
    which move when the store makes room. sums: of each layer with linear attention,
    (H, f, d_v + 1), and None of the others; empty at first.
    """

    search: "Search"
    row: int
    path: Tensor
    sums: Sequence[Any] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its own tokens, which it may share with hypotheses of the same beginning."""
        return len(self.path) * self.search.token_nbytes + _nbytes(self.sums)


class Search:
    """The caches of a decoder for the utterances that are searched together.

    Args:
        decoder: the KVTransformerDecoder.
        xs: (B, T, D) encoder output.
        mask: (B, 1, T), frames that exist; None: all.
    """

    def __init__(self, decoder: Any, xs: Tensor, mask: Tensor | None):
        self._decoder = decoder
        self.batch_size, self._dtype, self._device = len(xs), xs.dtype, xs.device
        self._slots, self._used = FIRST_SLOTS, 0
        self._living: weakref.WeakSet[Hypothesis] = weakref.WeakSet()
        spec = self._make_spec(xs, FIRST_SLOTS)
        self.states = [layer.self_attn.init_state(spec) for layer in decoder.decoders]
        self.replace_memory(xs, mask)

    def _make_spec(self, xs: Tensor, slots: int) -> StateSpec:
        return StateSpec(len(xs), slots, self._decoder.cache_dtype, xs.dtype, xs.device)

    def replace_memory(self, xs: Tensor, mask: Tensor | None) -> None:
        """Attend to another encoder output (B, T, D) from now on: one that went on."""
        self.frames = xs.size(1)
        spec = self._make_spec(xs, self.frames)
        states = [layer.src_attn.remember(xs, spec, mask) for layer in self._decoder.decoders]
        visible = None if mask is None else mask[:, None].ne(0)
        self.memory = Memory(states, Step.whole(xs), visible)

    def begin(self, hypotheses: Sequence[Hypothesis]) -> tuple[Step, Tensor]:
        """The step in which N hypotheses, K of each utterance, take one token more.

        Returns:
            The step, and the paths (N, L) of the hypotheses after it.
        """
        count = len(hypotheses) // self.batch_size
        if self._used + count > self._slots:
            self._make_room(count)
        b, device = self.batch_size, self._device
        states = [
            self._sums(hypotheses, index) if isinstance(state, LinearState) else state
            for index, state in enumerate(self.states)
        ]
        step = Step(
            states, None, [self._used] * b, [count] * b, [self._used] * b, self._slots, 1, device
        )
        step.apart = True
        new = torch.arange(self._used, self._used + count, device=device).repeat(b)[:, None]
        paths = torch.cat([torch.stack([h.path for h in hypotheses]), new], dim=1)
        size = (len(hypotheses), step.read)
        hidden = torch.full(size, -torch.inf, dtype=self._dtype, device=device)
        step.visible = hidden.scatter_(1, paths, 0.0).view(b, 1, count, step.read)
        self._used += count
        return step, paths

    def _sums(self, hypotheses: Sequence[Hypothesis], index: int) -> LinearState:
        """The sums of N hypotheses as one state, which the step may change."""
        state = self.states[index]
        size = state.tensors[0].shape[1:]
        old = [h.sums[index] if h.sums else state.tensors[0].new_zeros(size) for h in hypotheses]
        return LinearState.holding(torch.stack(old))

    def end(self, step: Step, paths: Tensor) -> list[Hypothesis]:
        """The N hypotheses after a step that `begin` gave."""
        sums = [s.tensors[0] if isinstance(s, LinearState) else None for s in step.states]
        count = len(paths) // self.batch_size
        hypotheses = [
            Hypothesis(self, n // count, path, [None if s is None else s[n] for s in sums])
            for n, path in enumerate(paths)
        ]
        self._living.update(hypotheses)
        return hypotheses

    def _make_room(self, count: int) -> None:
        """Drop the tokens that no hypothesis lists, and see that as many slots again are free."""
        living = list(self._living)
        listed = torch.zeros(self.batch_size, self._slots, dtype=torch.bool, device=self._device)
        for hypothesis in living:
            listed[hypothesis.row, hypothesis.path] = True
        held = listed.sum(1).tolist()
        self._used = max(held)
        order = listed.int().argsort(dim=1, descending=True, stable=True)[:, : self._used]
        for state in self._stores:
            state.keep(order, held)
        moved_to = listed.cumsum(1) - 1  # (B, slots)
        for hypothesis in living:
            hypothesis.path = moved_to[hypothesis.row, hypothesis.path]
        while 2 * (self._used + count) > self._slots:
            self._slots *= 2

    @property
    def _stores(self) -> list[FrameState]:
        """The states of the layers that keep every token."""
        return [state for state in self.states if isinstance(state, FrameState)]

    @property
    def token_nbytes(self) -> int:
        """Bytes of a token, in all layers that keep it."""
        return sum(state.frame_nbytes for state in self._stores)

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes held: {"self": of all tokens and sums, "cross": of all encoded utterances}."""
        sums = sum(_nbytes(hypothesis.sums) for hypothesis in self._living)
        own = sum(state.nbytes for state in self._stores)
        return {"self": own + sums, "cross": sum(state.nbytes for state in self.memory.states)}

    def nbytes_analytic(self) -> dict[str, int]:
        """What `nbytes_by_kind` should be, by arithmetic on the sizes of the model."""
        stored = [state.nbytes_analytic for state in self._stores]
        # a linear layer's empty sums, B of them, are as large as those of B hypotheses
        empty = [s.nbytes_analytic for s in self.states if isinstance(s, LinearState)]
        sums = len(self._living) * sum(empty) // self.batch_size
        cross = sum(state.nbytes_analytic for state in self.memory.states)
        return {"self": sum(stored) + sums, "cross": cross}


def _nbytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
