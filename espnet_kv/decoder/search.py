"""What a decoder keeps while it searches: once per token, and once per utterance.

Tokens of all hypotheses lie side by side in one append-only store per layer. A hypothesis is the
list of its slots, so choosing, dropping and forking hypotheses copies nothing of what is stored.

Shape letters: B utterances, K hypotheses of each, N = B K, L tokens, M slots, T encoder frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espnet_kv.cache import LinearState, StateSpec
from espnet_kv.step import Memory, Step

# slots that a store begins with; they double when full
FIRST_SLOTS = 64


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A hypothesis as its search knows it.

    search: what it shares with the others. path: (L,) the slots of its tokens. sums: of each
    layer with linear attention, (H, f, d_v + 1), and None of the others; empty at first.
    """

    search: "Search"
    path: Tensor
    sums: Sequence[Any] = ()


class Search:
    """The caches of a decoder for the utterances that are searched together.

    Args:
        decoder: the KVTransformerDecoder.
        xs: (B, T, D) encoder output.
        mask: (B, 1, T), frames that exist; None: all.
    """

    def __init__(self, decoder: Any, xs: Tensor, mask: Tensor | None):
        self._decoder = decoder
        self.batch_size = len(xs)
        self._slots, self._used = FIRST_SLOTS, 0
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
        while self._used + count > self._slots:
            self._slots *= 2
        b, device = self.batch_size, hypotheses[0].path.device
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
        seen = torch.zeros(len(hypotheses), step.read, dtype=torch.bool, device=device)
        step.visible = seen.scatter_(1, paths, True).view(b, 1, count, step.read)
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
        return [
            Hypothesis(self, path, [None if layer is None else layer[n] for layer in sums])
            for n, path in enumerate(paths)
        ]

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes held: {"self": of all tokens of all hypotheses, "cross": of all utterances}.

        The sums of linear attention belong to the hypotheses, not to the search.
        """
        own = sum(state.nbytes for state in self.states if not isinstance(state, LinearState))
        return {"self": own, "cross": sum(state.nbytes for state in self.memory.states)}
