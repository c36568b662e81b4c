"""Multi-head attention: ESPnet's, name for name and number for number."""

from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes, SoftmaxAttention
from espnet_kv.cache import InputState, KVState, StateSpec
from espnet_kv.errors import ConfigError


class MultiHeadAttention(SoftmaxAttention):
    """ESPnet's RelPositionMultiHeadedAttention (rel_pos) or MultiHeadedAttention.

    State-dict keys and outputs are ESPnet's, so its checkpoints load. The state per frame is K
    and V, 2 D numbers; or, with cache: input, the layer's input, D numbers from which K and V are
    projected anew in every chunk (what ESPnet's asr_transducer and others do).

    Args:
        sizes, dropout_rate, rel_pos, zero_triu: see SoftmaxAttention.
        qk_norm: LayerNorm on the heads of q and k (ESPnet's option of MultiHeadedAttention).
        cache: kv or input, what streaming keeps.

    Raises:
        ConfigError (a ValueError): unknown cache.
    """

    options = ("cache",)
    espnet_options = ("zero_triu", "qk_norm")

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
        super().__init__(sizes, dropout_rate, rel_pos, zero_triu)
        if cache not in ("kv", "input"):
            raise ConfigError(f"attention_conf.cache: unknown {cache!r} (allowed: kv, input)")
        self.cache = cache
        self.linear_k = nn.Linear(sizes.n_feat, sizes.n_feat)
        self.linear_v = nn.Linear(sizes.n_feat, sizes.n_feat)
        # optimizer states go by the order of parameters: keep ESPnet's, q k v out pos
        for name in ("linear_out", "linear_pos"):
            if name in self._modules:
                setattr(self, name, self._modules.pop(name))
        # ESPnet's LayerNorm: eps 1e-12
        self.q_norm = nn.LayerNorm(self.d_k, eps=1e-12) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.d_k, eps=1e-12) if qk_norm else nn.Identity()

    def project_q(self, query: Tensor) -> Tensor:
        return self.q_norm(super().project_q(query))

    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        k = self.linear_k(key).view(*key.shape[:2], self.h, self.d_k)
        v = self.linear_v(value).view(*value.shape[:2], self.h, self.d_k)
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def init_state(self, spec: StateSpec) -> KVState | InputState:
        if self.cache == "input":
            return InputState(spec, self.h * self.d_k)
        return KVState(spec, self.h, self.d_k)

    def to_store(self, x):
        return super().to_store(x) if self.cache == "kv" else (x[:, None],)

    def attend_stored(self, q, stored, bias):
        if self.cache == "input":
            inputs = stored[0][:, 0]  # (B, S, D)
            stored = self.project_kv(inputs, inputs)
        return super().attend_stored(q, stored, bias)
