"""Old place of names that moved; see `espnet_kv.attention`."""

from espnet_kv.attention.chunks import Chunks, draw_chunks
from espnet_kv.attention.positions import at_positions, sinusoid
from espnet_kv.attention.softmax import rel_shift

__all__ = ["Chunks", "at_positions", "draw_chunks", "rel_shift", "sinusoid"]
