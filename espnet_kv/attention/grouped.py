"""Multi-head, grouped-query and multi-query attention."""

from typing import Any

from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes
from espnet_kv.attention.softmax import SoftmaxAttention
from espnet_kv.cache.footprint import Footprint
from espnet_kv.errors import ConfigError


class GroupedQueryAttention(SoftmaxAttention):
    """Groups of attention_heads / num_kv_heads query heads share a key/value head.

    Grouped-query attention (arXiv 2305.13245). One key/value head gives multi-query attention;
    as many as query heads give multi-head attention, with the same parameter names. The state per
    frame is K and V, 2 d_k num_kv_heads numbers.

    Args:
        sizes, dropout_rate, rel_pos, zero_triu: see SoftmaxAttention.
        num_kv_heads: key/value heads G, a divisor of the number of heads; 1 = MQA.

    Raises:
        ConfigError (a ValueError): num_kv_heads does not divide the number of heads.
    """

    options: tuple[str, ...] = ("num_kv_heads",)
    colour_slot: int | None = 1

    def __init__(
        self,
        sizes: HeadSizes,
        dropout_rate: float,
        rel_pos: bool,
        zero_triu: bool = False,
        *,
        num_kv_heads: int = 1,
    ):
        super().__init__(sizes, dropout_rate, rel_pos, zero_triu)
        if type(num_kv_heads) is not int or num_kv_heads < 1 or self.h % num_kv_heads:
            divisors = [n for n in range(1, self.h + 1) if self.h % n == 0]
            raise ConfigError(
                f"attention_conf.num_kv_heads: {num_kv_heads!r} does not divide "
                f"attention_heads {self.h} (allowed: {', '.join(map(str, divisors))})"
            )
        self.num_kv_heads = num_kv_heads
        self.linear_k = nn.Linear(sizes.n_feat, num_kv_heads * self.d_k)
        self.linear_v = nn.Linear(sizes.n_feat, num_kv_heads * self.d_k)

    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        k = self.linear_k(key).view(*key.shape[:2], self.num_kv_heads, self.d_k)
        v = self.linear_v(value).view(*value.shape[:2], self.num_kv_heads, self.d_k)
        return self.norm_k(k).transpose(1, 2), v.transpose(1, 2)

    def norm_k(self, k: Tensor) -> Tensor:
        """Normalise the keys (B, S, G, d_k); here the identity."""
        return k

    @property
    def cached_vector_sizes(self) -> list[tuple[int, int]]:
        return [(self.num_kv_heads, self.d_k), (self.num_kv_heads, self.d_k)]

    @property
    def footprint(self) -> Footprint:
        return Footprint(frame=[(2 * self.num_kv_heads, self.d_k)])

    @property
    def label(self) -> str:
        return f"gqa G{self.num_kv_heads}"


class MultiHeadAttention(GroupedQueryAttention):
    """ESPnet's RelPositionMultiHeadedAttention (rel_pos) or MultiHeadedAttention.

    State-dict keys, their order and outputs are ESPnet's, so its checkpoints and optimizer states
    load. With `cache: input` the state per frame is the layer's input, D numbers, and K and V are
    projected again in every chunk, as in ESPnet's asr_transducer.

    Args:
        sizes, dropout_rate, rel_pos, zero_triu: see SoftmaxAttention.
        qk_norm: LayerNorm on the heads of q and k (ESPnet's option of MultiHeadedAttention).
        cache: kv or input, the vectors that streaming stores.

    Raises:
        ConfigError (a ValueError): unknown cache.
    """

    options = ("cache",)
    espnet_options = ("zero_triu", "qk_norm")
    colour_slot = 0

    def __init__(
        self,
        sizes: HeadSizes,
        dropout_rate: float,
        rel_pos: bool,
        zero_triu: bool = False,
        qk_norm: bool = False,
        *,
        cache: str = "kv",
    ):
        super().__init__(sizes, dropout_rate, rel_pos, zero_triu, num_kv_heads=sizes.n_head)
        if cache not in ("kv", "input"):
            raise ConfigError(f"attention_conf.cache: unknown {cache!r} (allowed: kv, input)")
        self.cache = cache
        # optimizer states depend on the order of parameters: keep ESPnet's, q k v out pos
        for name in ("linear_out", "linear_pos"):
            if name in self._modules:
                setattr(self, name, self._modules.pop(name))
        # ESPnet's LayerNorm: eps 1e-12
        self.q_norm = nn.LayerNorm(self.d_k, eps=1e-12) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.d_k, eps=1e-12) if qk_norm else nn.Identity()

    def project_q(self, query: Tensor) -> Tensor:
        return self.q_norm(super().project_q(query))

    def norm_k(self, k: Tensor) -> Tensor:
        return self.k_norm(k)

    @property
    def cached_vector_sizes(self) -> list[tuple[int, int]]:
        return [(1, self.n_feat)] if self.cache == "input" else super().cached_vector_sizes

    @property
    def footprint(self) -> Footprint:
        return Footprint(frame=[(1, self.n_feat)]) if self.cache == "input" else super().footprint

    @property
    def label(self) -> str:
        return "mha input" if self.cache == "input" else "mha"

    def cached_vectors(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().cached_vectors(x) if self.cache == "kv" else (x[:, None],)

    def attend_cached(self, q: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        if self.cache == "input":
            inputs = stored[0][:, 0]  # (B, S, D)
            stored = self.project_kv(inputs, inputs)
        return super().attend_cached(q, stored, bias)
