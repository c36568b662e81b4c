"""Old place of names that moved; see `espnet_kv.attention.latent`."""

from espnet_kv.attention.latent import MultiHeadLatentAttention

__all__ = ["MultiHeadLatentAttention"]
