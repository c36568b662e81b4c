"""States of streams and searches: the states of modules, their storage and their size in bytes."""

from espnet_kv.cache.footprint import Footprint
from espnet_kv.cache.state import KINDS, ConvState, FrameState, State, StateSpec, SumState
from espnet_kv.cache.stream import EncoderState

__all__ = [
    "KINDS",
    "ConvState",
    "EncoderState",
    "Footprint",
    "FrameState",
    "State",
    "StateSpec",
    "SumState",
]
