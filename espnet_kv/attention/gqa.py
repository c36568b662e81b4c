"""Grouped-query attention (arXiv 2305.13245); one key/value head is multi-query attention."""

from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes, SoftmaxAttention
from espnet_kv.cache import KVState, StateSpec
from espnet_kv.errors import ConfigError


class GroupedQueryAttention(SoftmaxAttention):
    """Query heads in groups of attention_heads / num_kv_heads share a key/value head.

    The state per frame is 2 d_k num_kv_heads numbers. With num_kv_heads = attention_heads it is
    multi-head attention, under the same parameter names.

    Args:
        sizes, dropout_rate, rel_pos, zero_triu: see SoftmaxAttention.
        num_kv_heads: key/value heads, a divisor of the heads; 1 = MQA.

    Raises:
        ConfigError (a ValueError): num_kv_heads does not divide the heads.
    """

    options = ("num_kv_heads",)

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
        return k.transpose(1, 2), v.transpose(1, 2)

    def init_state(self, spec: StateSpec) -> KVState:
        return KVState(spec, self.num_kv_heads, self.d_k)
