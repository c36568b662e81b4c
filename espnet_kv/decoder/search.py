"""The cache of a decoder or language model in beam search.

It holds vectors of each token and, for a decoder, of each encoded utterance. Each layer has one
store for the tokens of all hypotheses. A hypothesis is a list of slots, so selecting, dropping and
forking hypotheses copies no cached vectors. When the store is full, tokens that belong to no live
hypothesis are removed.

Shape letters: B utterances, K hypotheses of each, N = B K, L tokens, M slots, T encoder frames.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.cache.state import FrameState, StateSpec, SumState
from espnet_kv.cache.step import CacheStep

# initial slots of a store; they double when live tokens take more than half
FIRST_SLOTS = 64


class StoreStep(CacheStep):
    """One more token for K hypotheses of each utterance, or several for each.

    In the terms of `CacheStep`, utterances are the streams and the new tokens of their hypotheses
    the frames of a chunk. Each hypothesis attends to its own slots only.

    Args:
        states: states of the self-attention modules.
        memory: encoded utterances for cross-attention; None: there is none.
        first: the first of the slots for the new tokens.
        count: K, or K times the number of new tokens.
        visible: (B, 1, count, S), added to the logits.
        valid: (N, 1, 1, 1) bool, whether a single new token is visible; None: all are.
    """

    def __init__(
        self,
        states: Sequence[Any],
        memory: "Memory | None",
        first: int,
        count: int,
        visible: Tensor,
        valid: Tensor | None,
    ):
        self.states, self.memory, self.valid = states, memory, valid
        self._write, self.read = slice(first, first + count), first + count
        self.visible = visible

    def put(self, stored: Tensor, new: Tensor) -> None:
        stored[:, :, self._write] = new

    def get(self, stored: Tensor) -> Tensor:
        return stored[:, :, : self.read]

    def rows_of(self, stored: Tensor) -> Tensor:
        return stored

    def put_rows(self, stored: Tensor, new: Tensor) -> None:
        stored.copy_(new)

    def rows_per_sum(self, x: Tensor) -> Tensor:
        """(B, K, D) -> (N, 1, D): each hypothesis has its own sums."""
        return x.reshape(-1, 1, x.size(2))


class Memory(StoreStep):
    """Cached encoded utterances for cross-attention.

    Args:
        states: states of the cross-attention modules, by `state_index`.
        frames: T.
        visible: (B, 1, 1, T) bool, the frames that exist; None: all.
    """

    def __init__(self, states: Sequence[Any], frames: int, visible: Tensor | None):
        self.states, self.read, self.visible = states, frames, visible

    @property
    def own_states(self) -> list[Any]:
        """Each state once, where modules share one."""
        return list(dict.fromkeys(self.states))


def state_owners(attentions: Sequence[Any]) -> Sequence[Any]:
    """The cross-attention modules that have a state of their own."""
    return attentions[:1] if attentions and attentions[0].shares_state else attentions


@dataclass(eq=False)
class Hypothesis:
    """The state of one hypothesis.

    Attributes:
        search: the TokenSearch, the caches shared with other hypotheses.
        row: number of the utterance.
        path: (L,), slots of the tokens; updated when the store is compacted.
        sums: (H, f, d_v + 1) of each layer with linear attention, None for other layers; empty
            before the first token.
    """

    search: Any
    row: int
    path: Tensor
    sums: Sequence[Any] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its tokens, including tokens shared with other hypotheses."""
        return len(self.path) * self.search.token_nbytes + _nbytes(self.sums)


class TokenSearch:
    """The cached tokens of a search, for the self-attention of a decoder or language model.

    Args:
        attentions: the self-attention module of each layer.
        batch_size: B.
        cache_dtype: see `espnet_kv.cache.codec`.
        dtype, device: those of the model.
    """

    memory: "Memory | None" = None

    def __init__(
        self,
        attentions: Sequence[Any],
        batch_size: int,
        cache_dtype: str | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._attentions = attentions
        self.batch_size, self._dtype, self._device = batch_size, dtype, device
        self._cache_dtype = cache_dtype
        self._slots, self._used = FIRST_SLOTS, 0
        self._living: weakref.WeakSet[Hypothesis] = weakref.WeakSet()
        spec = self._make_spec(FIRST_SLOTS)
        self.states = [attention.init_state(spec) for attention in attentions]
        self._held = [0] * batch_size  # tokens in the store, of each utterance

    def _make_spec(self, slots: int) -> StateSpec:
        return StateSpec(self.batch_size, slots, self._cache_dtype, self._dtype, self._device)

    def first(self) -> Hypothesis:
        """The hypothesis without tokens."""
        return Hypothesis(self, 0, torch.zeros(0, dtype=torch.long, device=self._device))

    @property
    def tokens_per_step(self) -> int | None:
        """How many tokens of a hypothesis a step can take; None: any number."""
        return 1 if any(isinstance(state, SumState) for state in self.states) else None

    def begin(
        self, hypotheses: Sequence[Hypothesis], tokens: int = 1, exist: Tensor | None = None
    ) -> tuple[StoreStep, Tensor]:
        """Begin the step of more tokens for N hypotheses, K of each utterance.

        Args:
            hypotheses: before the step.
            tokens: new tokens of each hypothesis, at most `tokens_per_step`.
            exist: (N, L) bool, the tokens of each hypothesis, new ones included, that are visible;
                None: all.

        Returns:
            The step and the paths (N, L) of the hypotheses after it.
        """
        count = len(hypotheses) // self.batch_size * tokens  # slots for each utterance
        if self._used + count > self._slots:
            self._compact(count)
        b, first, device = self.batch_size, self._used, self._device
        states = [
            self._sums(hypotheses, index) if isinstance(state, SumState) else state
            for index, state in enumerate(self.states)
        ]
        self._used += count
        self._held = [held + count for held in self._held]
        new = torch.arange(first, self._used, device=device).repeat(b).view(-1, tokens)
        paths = torch.cat([torch.stack([h.path for h in hypotheses]), new], dim=1)
        size = (len(hypotheses), tokens, self._used)
        hidden = torch.full(size, -torch.inf, dtype=self._dtype, device=device)
        bias = hidden.new_zeros(paths.shape)
        if exist is not None:
            bias.masked_fill_(~exist, -torch.inf)
        for token in range(tokens):  # a token attends to itself and those before
            last = paths.size(1) - tokens + token + 1
            hidden[:, token].scatter_(1, paths[:, :last], bias[:, :last])
        visible = hidden.view(b, 1, count, self._used)
        valid = None if exist is None else exist[:, -1, None, None, None]
        return StoreStep(states, self.memory, first, count, visible, valid), paths

    def _sums(self, hypotheses: Sequence[Hypothesis], index: int) -> SumState:
        """The sums of N hypotheses as one new state."""
        state = self.states[index]
        size = state.tensors[0].shape[1:]
        old = [h.sums[index] if h.sums else state.tensors[0].new_zeros(size) for h in hypotheses]
        return SumState.holding(torch.stack(old))

    def end(self, step: StoreStep, paths: Tensor) -> list[Hypothesis]:
        """Return the N hypotheses after a step from `begin`."""
        sums = [s.tensors[0] if isinstance(s, SumState) else None for s in step.states]
        count = len(paths) // self.batch_size
        hypotheses = [
            Hypothesis(self, n // count, path, [None if s is None else s[n] for s in sums])
            for n, path in enumerate(paths)
        ]
        self._living.update(hypotheses)
        return hypotheses

    def _compact(self, count: int) -> None:
        """Remove tokens of no live hypothesis, and keep at least half of the slots free."""
        living = list(self._living)
        listed = torch.zeros(self.batch_size, self._slots, dtype=torch.bool, device=self._device)
        for hypothesis in living:
            listed[hypothesis.row, hypothesis.path] = True
        held = listed.sum(1).tolist()
        self._used = max(held)
        order = listed.int().argsort(dim=1, descending=True, stable=True)[:, : self._used]
        self._held = held
        for state in self._stores:
            state.keep(order)
        moved_to = listed.cumsum(1) - 1  # (B, slots)
        for hypothesis in living:
            hypothesis.path = moved_to[hypothesis.row, hypothesis.path]
        while 2 * (self._used + count) > self._slots:
            self._slots *= 2
        for state in self._stores:
            if state.slots < self._slots:
                state.grow(self._slots)

    @property
    def _stores(self) -> list[FrameState]:
        """States of the layers that cache every token."""
        return [state for state in self.states if isinstance(state, FrameState)]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token in all layers that cache it."""
        return sum(state.frame_nbytes for state in self._stores)

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes in use: {"self": tokens and sums}."""
        sums = sum(_nbytes(hypothesis.sums) for hypothesis in self._living)
        return {"self": sum(state.nbytes(self._held) for state in self._stores) + sums}

    def capacity_by_kind(self) -> dict[str, int]:
        """Bytes allocated, by the kinds of `nbytes_by_kind`.

        The sums of all hypotheses of a step share one storage, which is freed with the last of
        them.
        """
        own = [tensor for state in self.states for tensor in state.tensors]
        sums = [x for hypothesis in self._living for x in hypothesis.sums if x is not None]
        return {"self": _storage_nbytes([*own, *sums])}

    def nbytes_analytic(self) -> dict[str, int]:
        """The expected `nbytes_by_kind`, computed from the configuration of the model."""
        own = self._footprint(self._attentions, self._held)
        # the constant part is per hypothesis, not per utterance
        constant = self._footprint(self._attentions, [0])
        return {"self": own + (len(self._living) - self.batch_size) * constant}

    def _footprint(self, attentions: Sequence[Any], held: Sequence[int]) -> int:
        return sum(a.footprint.nbytes(held, self._cache_dtype, self._dtype) for a in attentions)

    @property
    def living(self) -> int:
        """Number of live hypotheses."""
        return len(self._living)

    @property
    def held(self) -> list[int]:
        """Tokens in the store, of each utterance."""
        return list(self._held)


class Search(TokenSearch):
    """The caches of a decoder for a batch of utterances.

    Args:
        decoder: a CachedDecoder.
        xs: (B, T, D) encoder output.
        mask: (B, 1, T), frames that exist; None: all.
    """

    memory: Memory

    def __init__(self, decoder: Any, xs: Tensor, mask: Tensor | None):
        attentions = decoder.self_attentions
        super().__init__(attentions, len(xs), decoder.cache_dtype, xs.dtype, xs.device)
        self._cross = decoder.src_attentions
        self._cross_owners = state_owners(self._cross)
        self.replace_memory(xs, mask)

    def replace_memory(self, xs: Tensor, mask: Tensor | None) -> None:
        """Replace the encoder output by (B, T, D), e.g. when it has grown."""
        self.frames = xs.size(1)
        spec = self._make_spec(self.frames)
        own = [attention.init_cross_state(xs, spec, mask) for attention in self._cross_owners]
        states = own if len(own) == len(self._cross) else own * len(self._cross)
        self.memory = Memory(states, self.frames, None if mask is None else mask[:, None].ne(0))

    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes in use: {"self": tokens and sums, "cross": encoded utterances}."""
        frames = [self.frames] * self.batch_size
        cross = sum(state.nbytes(frames) for state in self.memory.own_states)
        return super().nbytes_by_kind() | {"cross": cross}

    def capacity_by_kind(self) -> dict[str, int]:
        cross = [tensor for state in self.memory.states for tensor in state.tensors]
        return super().capacity_by_kind() | {"cross": _storage_nbytes(cross)}

    def nbytes_analytic(self) -> dict[str, int]:
        cross = self._footprint(self._cross_owners, [self.frames] * self.batch_size)
        return super().nbytes_analytic() | {"cross": cross}


def transpose_weights(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    """Transpose the memory layout of weights for products with few rows on a CPU.

    BLAS then takes about half the time. Values do not change, but parameters are no longer
    contiguous, so only decoding commands call this, and not training.

    Args:
        kinds: classes of the modules whose `weight` is transposed.
    """
    for module in model.modules():
        if isinstance(module, kinds) and module.weight.device.type == "cpu":
            module.weight.data = module.weight.data.t().contiguous().t()


def _storage_nbytes(tensors: Sequence[Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _nbytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
