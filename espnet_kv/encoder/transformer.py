"""kv_transformer, the encoder."""

from collections.abc import Iterator
from typing import Any

from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from torch import Tensor, nn

from espnet_kv.encoder.streaming import StreamingEncoder
from espnet_kv.position import Chunks
from espnet_kv.step import running


class KVTransformerEncoder(StreamingEncoder, TransformerEncoder):
    """ESPnet's TransformerEncoder (arXiv 1706.03762) with the arguments of KVEncoder.

    Its positions are absolute, and nothing in it looks over time but attention (and, where
    positionwise_layer_type says so, feed-forward convolutions). With attention_type mha and no
    chunks it is ESPnet's: same parameters, same output.
    """

    attention_slot = "self_attn"
    _chunks: Chunks | None = None

    def __init__(self, input_size: int, *args: Any, **conf: Any):
        super().__init__(input_size, *args, **conf)
        for block in self.encoders:
            block.self_attn.register_forward_pre_hook(self._put_position)

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        return iter(())

    def _takes_our_attention(self, conf: dict, attention_type: str, chunked: bool) -> bool:
        return True

    def _has_relative_positions(self, conf: dict) -> bool:
        return False

    def _positional_encoding(self) -> nn.Module | None:
        if self.espnet_conf["input_layer"] == "wav2vec":
            return self.embed[0]
        return super()._positional_encoding()

    def _hand_out_chunks(self, module: nn.Module, args: tuple, output: Any) -> Any:
        handed_out = super()._hand_out_chunks(module, args, output)
        if not isinstance(handed_out, tuple):
            self._chunks = None
            return handed_out
        x, position = handed_out
        if isinstance(position, Chunks):
            self._chunks = position
        return x

    def _put_position(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple | None:
        """Pre-hook on attention: these blocks have no slot for positions, so it is added here."""
        position = running.get() or self._chunks
        return None if position is None else (*args[:3], position, args[3])
