"""kv_e_branchformer."""

from collections.abc import Iterator

from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from torch import nn

from espnet_kv.encoder.streaming import StreamingEncoder


class KVEBranchformerEncoder(StreamingEncoder, EBranchformerEncoder):
    """ESPnet's EBranchformerEncoder (arXiv 2210.00077) with the arguments of KVEncoder.

    With attention_type mha, causal false and no chunks it is ESPnet's: same parameters, same
    output.
    """

    layer_type_key = "attention_layer_type"
    attention_slot = "attn"

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        yield block.cgmlp.csgu, "conv"  # type: ignore[misc, union-attr]
        yield block, "depthwise_conv_fusion"
