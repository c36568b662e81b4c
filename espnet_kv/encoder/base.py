"""Old place of names that moved; see `espnet_kv.encoder.chunked`."""

from espnet_kv.encoder.chunked import KVEncoder

__all__ = ["KVEncoder"]
