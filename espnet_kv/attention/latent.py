"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes
from espnet_kv.attention.softmax import SoftmaxAttention, grouped_attention
from espnet_kv.cache.footprint import Footprint
from espnet_kv.errors import ConfigError, UserError


class MultiHeadLatentAttention(SoftmaxAttention):
    """Keys and values are computed from one latent: c = W_down x, K = W_uk c, V = W_uv c + b_v.

    The state per frame is the latent, kv_rank numbers. ESPnet's relative positions affect only
    the query and the position table, so keys need no separate position part (DeepSeek's partial
    RoPE). K has no bias, because it would add a constant to all logits of a query and softmax
    cancels it.

    Args:
        sizes, dropout_rate, rel_pos, zero_triu: see SoftmaxAttention.
        kv_rank: size r of the latent, 1 to 2 D (2 D can represent any pair of K and V maps). A
            float is a fraction of D, above 0 and at most 2.0: 0.25 is D / 4, rounded.

    Raises:
        ConfigError (a ValueError): kv_rank is out of range.
    """

    options = ("kv_rank",)
    colour_slot = 2
    can_share_state = True

    def __init__(
        self,
        sizes: HeadSizes,
        dropout_rate: float,
        rel_pos: bool,
        zero_triu: bool = False,
        *,
        kv_rank: int | float = 64,
    ):
        super().__init__(sizes, dropout_rate, rel_pos, zero_triu)
        self.kv_rank = kv_rank = _rank(kv_rank, sizes.n_feat)
        self.linear_kv_down = nn.Linear(sizes.n_feat, kv_rank, bias=False)
        self.linear_k_up = nn.Linear(kv_rank, sizes.n_feat, bias=False)
        self.linear_v_up = nn.Linear(kv_rank, sizes.n_feat)

    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # in self- and cross-attention, keys and values come from the same frames
        return self._expand(self.linear_kv_down(key))

    @property
    def cached_vector_sizes(self) -> list[tuple[int, int]]:
        return [(1, self.kv_rank)]

    @property
    def footprint(self) -> Footprint:
        return Footprint(frame=[(1, self.kv_rank)])

    @property
    def label(self) -> str:
        return f"mla r{self.kv_rank}" + (" of all layers" if self.shares_state else "")

    def share_state(self, first):
        """One latent for all layers: with r = D it can represent the keys and values of each."""
        super().share_state(first)
        if self.linear_kv_down is not first.linear_kv_down:
            self.linear_kv_down = first.linear_kv_down
            self.register_load_state_dict_pre_hook(_refuse_another_latent)

    def cached_vectors(self, x):
        return (self.linear_kv_down(x)[:, None],)

    def attend_cached(self, q, stored, bias):
        (latent,) = stored  # (B, 1, S, r)
        # a quantised layer has no weight tensor for the absorbed product
        floating = isinstance(self.linear_k_up.weight, Tensor)
        if floating and self.absorbing_is_cheaper(q.size(2), latent.size(2)):
            return self.attend_absorbed(q, latent, bias)
        return self.attend_expanded(q, latent, bias)

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Compare the multiply-accumulates of `attend_absorbed` and `attend_expanded`."""
        d, r = self.h * self.d_k, self.kv_rank
        absorbed = 2 * queries * d * r + 2 * queries * keys * self.h * r
        expanded = 2 * keys * d * r + 2 * queries * keys * d
        return absorbed < expanded

    def attend_absorbed(self, q: Tensor, latent: Tensor, bias: Tensor | None) -> Tensor:
        """Attend to latents directly: multiply q W_uk with c and apply W_uv to the result.

        Args:
            q: (R, H, Q, d_k).
            latent: (R, 1, S, r).
            bias: see `grouped_attention`.

        Returns:
            (R, H, Q, d_k).
        """
        k_up = self.linear_k_up.weight.view(self.h, self.d_k, self.kv_rank)
        v_up = self.linear_v_up.weight.view(self.h, self.d_k, self.kv_rank)
        v_bias = self.linear_v_up.bias.view(self.h, 1, self.d_k)
        q = torch.matmul(q, k_up)  # (R, H, Q, r)
        # one "key/value head" of size r, but the logits keep the scale of heads of size d_k
        out = grouped_attention(q, latent, latent, bias, 0.0, scale=1 / math.sqrt(self.d_k))
        # attention weights sum to one, so the bias can be added after the sum
        return torch.matmul(out, v_up.transpose(1, 2)) + v_bias

    def attend_expanded(self, q: Tensor, latent: Tensor, bias: Tensor | None) -> Tensor:
        """The same result with explicit keys and values; arguments as in `attend_absorbed`."""
        k, v = self._expand(latent[:, 0])
        return grouped_attention(q, k, v, bias, 0.0)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, r) -> keys and values, each (B, H, S, d_k)."""
        k = self.linear_k_up(latent).view(*latent.shape[:2], self.h, self.d_k)
        v = self.linear_v_up(latent).view(*latent.shape[:2], self.h, self.d_k)
        return k.transpose(1, 2), v.transpose(1, 2)


def _refuse_another_latent(
    module: Any, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any
) -> None:
    """Raise a UserError if a checkpoint has another latent for a layer than for the first.

    It would replace that of all layers: parameters with several names are loaded once for each.
    """
    loaded = module.linear_kv_down.weight  # by now that of the first layer
    given = state_dict.get(key := f"{prefix}linear_kv_down.weight")
    if given is None or given.shape != loaded.shape:
        return  # torch reports these
    if not torch.allclose(given.to(loaded), loaded, rtol=0, atol=0, equal_nan=True):
        raise UserError(
            f"the checkpoint does not fit: {key} differs from that of the first layer, and "
            "src_attention_conf has shared_latent: true; leave shared_latent out"
        )


def _rank(given: int | float, size: int) -> int:
    """The size of the latent, from a number or a fraction of the model size."""
    if type(given) is int and 1 <= given <= 2 * size:
        return given
    if type(given) is float and 0 < given <= 2:
        return max(1, round(given * size))
    raise ConfigError(
        f"attention_conf.kv_rank: {given!r} is neither a whole number from 1 to {2 * size} "
        "(twice output_size) nor a fraction of output_size above 0 and at most 2.0"
    )
