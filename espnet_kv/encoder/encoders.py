"""ESPnet's Conformer, Branchformer, E-Branchformer and Transformer encoders with KVEncoder."""

from collections.abc import Iterator
from typing import Any

from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from torch import Tensor, nn

from espnet_kv.cache.step import current_step
from espnet_kv.encoder.streaming import StreamingEncoder


class KVConformerEncoder(StreamingEncoder, ConformerEncoder):
    """ESPnet's ConformerEncoder (arXiv 2005.08100) with the arguments of KVEncoder.

    With attention_type mha, causal false and no chunks, parameters and output are ESPnet's.
    """

    layer_type_key = "selfattention_layer_type"
    attention_slot = "self_attn"

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        if block.conv_module is not None:
            yield block.conv_module, "depthwise_conv"  # type: ignore[misc]


class KVBranchformerEncoder(StreamingEncoder, BranchformerEncoder):
    """ESPnet's BranchformerEncoder (Peng et al., ICML 2022) with the arguments of KVEncoder.

    With attention_type mha, causal false and no chunks, parameters and output are ESPnet's.
    """

    layer_type_key = "attention_layer_type"
    attention_slot = "attn"

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        if block.cgmlp is not None:
            yield block.cgmlp.csgu, "conv"  # type: ignore[misc, union-attr]


class KVEBranchformerEncoder(StreamingEncoder, EBranchformerEncoder):
    """ESPnet's EBranchformerEncoder (arXiv 2210.00077) with the arguments of KVEncoder.

    With attention_type mha, causal false and no chunks, parameters and output are ESPnet's.
    """

    layer_type_key = "attention_layer_type"
    attention_slot = "attn"

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        yield block.cgmlp.csgu, "conv"  # type: ignore[misc, union-attr]
        yield block, "depthwise_conv_fusion"


class KVTransformerEncoder(StreamingEncoder, TransformerEncoder):
    """ESPnet's TransformerEncoder (arXiv 1706.03762) with the arguments of KVEncoder.

    Positions are absolute, and blocks have no convolution over time unless positionwise_layer_type
    is a convolution. With attention_type mha and no chunks, parameters and output are ESPnet's.
    """

    attention_slot = "self_attn"

    def __init__(self, input_size: int, *args: Any, **conf: Any):
        super().__init__(input_size, *args, **conf)
        for block in self.encoders:
            block.self_attn.register_forward_pre_hook(self._add_chunks)

    @staticmethod
    def time_convolutions(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        return iter(())

    def _replaces_attention(self, conf: dict, attention_type: str, chunked: bool) -> bool:
        return True

    def _has_relative_positions(self, conf: dict) -> bool:
        return False

    def _positional_encoding(self) -> nn.Module | None:
        if self.espnet_conf["input_layer"] == "wav2vec":
            return self.embed[0]
        return super()._positional_encoding()

    def _pass_chunks(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if current_step.get() is None:
            return output  # these blocks have no argument for positions; see `_add_chunks`
        return super()._pass_chunks(module, args, output)

    def _add_chunks(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple | None:
        """Pre-hook on attention: add the chunk mask to its arguments."""
        chunks = None if current_step.get() is not None else self._chunks(None)
        return None if chunks is None else (*args[:3], chunks, args[3])
