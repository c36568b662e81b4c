"""kv_branchformer."""

from collections.abc import Iterator

from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from torch import nn

from espnet_kv.encoder.streaming import StreamingEncoder


class KVBranchformerEncoder(StreamingEncoder, BranchformerEncoder):
    """ESPnet's BranchformerEncoder (Peng et al., ICML 2022) with the arguments of KVEncoder.

    With attention_type mha, causal false and no chunks it is ESPnet's: same parameters, same
    output.
    """

    layer_type_key = "attention_layer_type"
    attention_slot = "attn"

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        if block.cgmlp is not None:
            yield block.cgmlp.csgu, "conv"  # type: ignore[misc, union-attr]
