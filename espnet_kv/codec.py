"""Old place of names that moved; see `espnet_kv.cache.codec`."""

from espnet_kv.cache.codec import FLOATS, INTEGERS, build_codec

__all__ = ["FLOATS", "INTEGERS", "build_codec"]
