"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from torch import Tensor, nn

from espnet_kv.attention.base import HeadSizes, SoftmaxAttention
from espnet_kv.errors import ConfigError


class MultiHeadLatentAttention(SoftmaxAttention):
    """Keys and values are read from one latent: c = W_down x, K = W_uk c, V = W_uv c + b_v.

    The state per frame is the latent, kv_rank numbers. ESPnet's relative positions live in the
    query and the position table only, so keys need no separate position part (DeepSeek's partial
    RoPE). K has no bias: it would add the same to every logit of a query, and softmax cancels it.

    Args:
        sizes, dropout_rate, rel_pos, zero_triu: see SoftmaxAttention.
        kv_rank: size r of the latent, 1 to 2 D (at 2 D any pair of K, V maps is reachable).

    Raises:
        ConfigError (a ValueError): kv_rank is out of range.
    """

    options = ("kv_rank",)

    def __init__(
        self,
        sizes: HeadSizes,
        dropout_rate: float,
        rel_pos: bool,
        zero_triu: bool = False,
        *,
        kv_rank: int = 64,
    ):
        super().__init__(sizes, dropout_rate, rel_pos, zero_triu)
        if type(kv_rank) is not int or not 1 <= kv_rank <= 2 * sizes.n_feat:
            raise ConfigError(
                f"attention_conf.kv_rank: {kv_rank!r} is not a whole number from 1 to "
                f"{2 * sizes.n_feat} (twice output_size)"
            )
        self.kv_rank = kv_rank
        self.linear_kv_down = nn.Linear(sizes.n_feat, kv_rank, bias=False)
        self.linear_k_up = nn.Linear(kv_rank, sizes.n_feat, bias=False)
        self.linear_v_up = nn.Linear(kv_rank, sizes.n_feat)

    def project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # self- and cross-attention read keys and values from the same frames
        latent = self.linear_kv_down(key)  # (B, S, r)
        k = self.linear_k_up(latent).view(*key.shape[:2], self.h, self.d_k)
        v = self.linear_v_up(latent).view(*key.shape[:2], self.h, self.d_k)
        return k.transpose(1, 2), v.transpose(1, 2)
