"""kv_conformer."""

from collections.abc import Iterator

from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from torch import nn

from espnet_kv.encoder.streaming import StreamingEncoder


class KVConformerEncoder(StreamingEncoder, ConformerEncoder):
    """ESPnet's ConformerEncoder (arXiv 2005.08100) with the arguments of KVEncoder.

    With attention_type mha, causal false and no chunks it is ESPnet's: same parameters, same
    output.
    """

    layer_type_key = "selfattention_layer_type"
    attention_slot = "self_attn"

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        if block.conv_module is not None:
            yield block.conv_module, "depthwise_conv"  # type: ignore[misc]
