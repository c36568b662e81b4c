"""Old place of names that moved; see `espnet_kv.attention.grouped`."""

from espnet_kv.attention.grouped import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
