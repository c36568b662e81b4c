"""Multi-head attention: ESPnet's, name for name and number for number."""

from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes, SoftmaxAttention


class MultiHeadAttention(SoftmaxAttention):
    """ESPnet's RelPositionMultiHeadedAttention (rel_pos) or MultiHeadedAttention.

    State-dict keys and outputs are ESPnet's, so its checkpoints load. The state per frame is K
    and V, 2 D numbers.

    Args:
        sizes, dropout_rate, rel_pos, zero_triu: see SoftmaxAttention.
        qk_norm: LayerNorm on the heads of q and k (ESPnet's option of MultiHeadedAttention).
    """

    espnet_options = ("zero_triu", "qk_norm")

    def __init__(
        self,
        sizes: HeadSizes,
        dropout_rate: float,
        rel_pos: bool,
        zero_triu: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__(sizes, dropout_rate, rel_pos, zero_triu)
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
