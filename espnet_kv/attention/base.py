"""Base class of the attention modules: ESPnet's call signature and the state protocol.

Shape letters: B batch, R streams of a step, H heads, Q queries, S keys, T frames, D model size,
d_k head size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from espnet_kv.attention.chunks import Chunks
from espnet_kv.cache.footprint import Footprint
from espnet_kv.cache.state import State, StateSpec
from espnet_kv.cache.step import CacheStep, current_step
from espnet_kv.errors import ConfigError


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of an attention layer, checked on construction.

    Raises:
        ConfigError (a ValueError): the model size is not a multiple of the number of heads.
    """

    n_head: int
    n_feat: int

    def __post_init__(self) -> None:
        if self.n_head < 1 or self.n_feat % self.n_head:
            raise ConfigError(
                f"attention_heads: {self.n_head} does not divide output_size {self.n_feat}"
            )

    @property
    def d_k(self) -> int:
        """Size of a head."""
        return self.n_feat // self.n_head


class Attention(nn.Module):
    """Base of the attention modules that ESPnet's blocks can hold.

    The call is ESPnet's: `forward(query, key, value, pos_emb, mask)` with relative positions,
    `forward(query, key, value, mask)` without. A chunked encoder passes `Chunks` in place of
    pos_emb in both cases. While an encoder or decoder runs with a cache, the module reads its
    state from the `CacheStep` of the context instead.

    A subclass defines its options, its state, the footprint of that state, its label and its
    colour.

    Args:
        sizes: heads and model size.
        dropout_rate: dropout on the attention weights.
        rel_pos: use relative positions (ESPnet's "latest" rel_selfattn) or none (selfattn).

    Attributes:
        options: keyword arguments that a user may set in attention_conf.
        espnet_options: options of ESPnet's attention modules that this module also accepts.
        colour_slot: place in tables and colour in figures (index of `report.comparison.PALETTE`);
            None: the next free one.
        state_index: index of this module's state in `CacheStep.states`; set by the encoder or
            decoder.
        cross: True for attention to the encoder output, False for self-attention; set by the
            decoder.
        can_share_state: whether the cross-attention modules of a decoder, which read the same
            frames, can have one state.
        shares_state: whether they do; see `share_state`.
    """

    options: tuple[str, ...] = ()
    espnet_options: tuple[str, ...] = ()
    colour_slot: int | None = None
    state_index: int
    cross: bool = False
    can_share_state: bool = False
    shares_state: bool = False

    def __init__(self, sizes: HeadSizes, dropout_rate: float, rel_pos: bool):
        super().__init__()
        self.h, self.d_k = sizes.n_head, sizes.d_k
        self.n_feat = sizes.n_feat
        self.dropout_rate = dropout_rate
        self.rel_pos = rel_pos

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *context: Any) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, D).
            key, value: (B, S, D).
            context: optionally pos_emb (1, 2T-1, D) or Chunks, then the mask: (B, 1, S) or
                (B, Q, S), nonzero for visible keys, or None. Ignored while a CacheStep is active,
                because the step defines which keys are visible.

        Returns:
            (B, Q, D).
        """
        step = current_step.get()
        if step is not None:
            return self.cross_attend(query, step) if self.cross else self.step(query, step)
        position, mask = context if len(context) == 2 else (None, *context)
        chunks = position if isinstance(position, Chunks) else Chunks(position, 0)
        return self.attend(query, key, value, mask, chunks)

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, chunks: Chunks
    ) -> Tensor:
        """One pass over all frames.

        Args:
            query, key, value, mask: see `forward`.
            chunks: relative positions and the chunk mask; size 0: no chunk mask.
        """

    @abstractmethod
    def init_state(self, spec: StateSpec) -> State:
        """Create an empty state of this module."""

    @property
    @abstractmethod
    def footprint(self) -> Footprint:
        """Size of the state, computed from the configuration."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables and figures, e.g. "mla r64"."""

    @abstractmethod
    def step(self, x: Tensor, step: CacheStep) -> Tensor:
        """Self-attention of a chunk (R, Q, D) over the cached frames and itself -> (R, Q, D)."""

    @abstractmethod
    def init_cross_state(self, memory: Tensor, spec: StateSpec, mask: Tensor | None) -> State:
        """Create the state of cross-attention for encoded utterances.

        Args:
            memory: encoder output (B, T, D).
            spec: with T slots.
            mask: (B, 1, T), nonzero for frames that exist; None: all exist.
        """

    @abstractmethod
    def cross_attend(self, x: Tensor, step: CacheStep) -> Tensor:
        """Cross-attention of (B, Q, D) over the state of `init_cross_state` -> (B, Q, D)."""

    def share_state(self, first: "Attention") -> None:
        """Read the state of `first`, the first cross-attention module of the same decoder."""
        self.shares_state = True

    def position_table(self, pos_emb: Tensor) -> Tensor | None:
        """Relative positions (1, P, D) as projected by this module; None: it does not use them."""
        return None


def share_one_state(attentions: Sequence[Attention]) -> None:
    """Let the cross-attention modules of a decoder have one state, that of the first."""
    for attention in attentions:
        attention.share_state(attentions[0])
