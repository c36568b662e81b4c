"""The attention mechanisms under the names and with the call of openai-whisper's."""

from collections.abc import Mapping
from functools import cache
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from espnet_kv.attention import check_attention
from espnet_kv.attention.base import Attention, HeadSizes

# our name of a projection -> openai-whisper's
NAMES = {"linear_q": "query", "linear_k": "key", "linear_v": "value", "linear_out": "out"}


class WhisperAttention:
    """Mixin for an attention class; it must come before that class in the bases.

    Projections carry the names of openai-whisper's MultiHeadAttention, keys have no bias, and the
    call is `forward(x, xa, mask, kv_cache) -> (output, None)`. With mha, state-dict keys and
    outputs are openai-whisper's: its scale of d_k ** -0.25 on queries and on keys is 1 / sqrt(d_k)
    on the logits.
    """

    _modules: dict[str, Any]
    linear_q = property(attrgetter("query"))
    linear_k = property(attrgetter("key"))
    linear_v = property(attrgetter("value"))
    linear_out = property(attrgetter("out"))

    def __init__(self, sizes: HeadSizes, **options: Any):
        super().__init__(sizes, 0.0, False, **options)  # type: ignore[call-arg]
        for ours in list(self._modules):
            self._modules[NAMES.get(ours, ours)] = self._modules.pop(ours)
        if "key" in self._modules:
            self._modules["key"].register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        xa: Tensor | None = None,
        mask: Tensor | None = None,
        kv_cache: Any = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            x: (B, Q, D).
            xa: (B, S, D), the encoder output; None: self-attention.
            mask: (L, L) with L >= Q, 0 for visible keys; None: all are visible.
            kv_cache: not used.

        Returns:
            (B, Q, D), and None in place of the logits.
        """
        return super().forward(*self.espnet_arguments(x, xa, mask)), None  # type: ignore[misc]

    def espnet_arguments(
        self,
        x: Tensor,
        xa: Tensor | None = None,
        mask: Tensor | None = None,
        kv_cache: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments of `forward` as ESPnet's: query, key, value and mask."""
        keys = x if xa is None else xa
        frames = x.size(1)
        return x, keys, keys, None if mask is None else mask[None, :frames, :frames].eq(0)


@cache
def whisper_class(attention: type[Attention]) -> Any:
    """The attention class with WhisperAttention."""
    return type(f"Whisper{attention.__name__}", (WhisperAttention, attention), {})


def replace_whisper_attention(
    block: nn.Module, slot: str, attention_type: str, attention_conf: Mapping[str, Any]
) -> Any:
    """Replace the attention module of a block of openai-whisper's model.

    The new module takes over the weights whose names and sizes it shares; with mha, all.

    Args:
        block: the block.
        slot: its attribute that holds the module, attn or cross_attn.
        attention_type, attention_conf: see `espnet_kv.attention.build_attention`.

    Returns:
        The new module.

    Raises:
        ConfigError (a ValueError): see `espnet_kv.attention.build_attention`.
    """
    stock: Any = getattr(block, slot)
    sizes = HeadSizes(stock.n_head, stock.query.in_features)
    kind: Any = check_attention(attention_type, attention_conf)
    attention = whisper_class(kind)(sizes, **attention_conf)
    wanted = attention.state_dict()
    shared = {
        key: value
        for key, value in stock.state_dict().items()
        if key in wanted and wanted[key].shape == value.shape
    }
    attention.load_state_dict(shared, strict=False)
    setattr(block, slot, attention)
    return attention
