"""Small encoders of every kind, ESPnet's and ours, with inputs and outputs."""

from typing import Any

import pytest
import torch
from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from torch import Tensor, nn

from espnet_kv.encoder.encoders import (
    KVBranchformerEncoder,
    KVConformerEncoder,
    KVEBranchformerEncoder,
    KVTransformerEncoder,
)

FEATURES, SIZE, BLOCKS = 20, 16, 2

STOCK = {
    "kv_conformer": ConformerEncoder,
    "kv_branchformer": BranchformerEncoder,
    "kv_e_branchformer": EBranchformerEncoder,
}
OURS = {
    "kv_conformer": KVConformerEncoder,
    "kv_branchformer": KVBranchformerEncoder,
    "kv_e_branchformer": KVEBranchformerEncoder,
}
SIZES: dict[str, dict[str, Any]] = {
    "kv_conformer": {
        "linear_units": 24,
        "macaron_style": True,
        "rel_pos_type": "latest",
        "cnn_module_kernel": 7,
    },
    "kv_branchformer": {"cgmlp_linear_units": 24, "cgmlp_conv_kernel": 7},
    "kv_e_branchformer": {
        "cgmlp_linear_units": 24,
        "cgmlp_conv_kernel": 7,
        "merge_conv_kernel": 5,
        "use_ffn": True,
        "macaron_ffn": True,
        "linear_units": 24,
    },
    "kv_transformer": {"linear_units": 24},
}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "mha": {"attention_type": "mha"},
    "gqa": {"attention_type": "gqa", "attention_conf": {"num_kv_heads": 2}},
    "mqa": {"attention_type": "gqa", "attention_conf": {"num_kv_heads": 1}},
    "mla": {"attention_type": "mla", "attention_conf": {"kv_rank": 5}},
    "linear": {"attention_type": "linear"},
    "hedgehog": {"attention_type": "linear", "attention_conf": {"feature_map": "hedgehog"}},
}
NO_DROPOUT = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0}
encoders = pytest.mark.parametrize("name", OURS)
attentions = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
positions = pytest.mark.parametrize("rel_pos", [True, False], ids=["rel", "abs"])


def position_conf(name: str, rel_pos: bool) -> dict[str, str]:
    if rel_pos or name == "kv_transformer":
        return {}
    return {OURS[name].layer_type_key: "selfattn", "pos_enc_layer_type": "abs_pos"}


def build(name: str, **conf: Any) -> nn.Module:
    """A small encoder of ours."""
    return _build((OURS | {"kv_transformer": KVTransformerEncoder})[name], name, **conf)


def build_stock(name: str, **conf: Any) -> nn.Module:
    """The ESPnet encoder of the same kind."""
    return _build((STOCK | {"kv_transformer": TransformerEncoder})[name], name, **conf)


def _build(cls: type, name: str, features: int = FEATURES, **conf: Any) -> nn.Module:
    """An encoder with weights and statistics far from their initialisation, in eval mode."""
    sizes = {"output_size": SIZE, "attention_heads": 4, "num_blocks": BLOCKS}
    encoder = cls(features, **sizes | SIZES[name] | NO_DROPOUT | conf)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in encoder.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_()
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return encoder.eval()


def pair(name: str, stock_conf: dict[str, Any], **conf: Any) -> tuple[nn.Module, nn.Module]:
    """ESPnet's encoder and ours with its state dict, loaded strictly."""
    stock = build_stock(name, **conf, **stock_conf)
    ours = build(name, **conf)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def batch(*lengths: int, features: int = FEATURES) -> tuple[Tensor, Tensor]:
    """Features with large values in the padding, and their lengths."""
    x = torch.randn(len(lengths), max(lengths), features)
    for utterance, length in zip(x, lengths, strict=True):
        utterance[length:] *= 100
    return x, torch.tensor(lengths)


def outputs(encoder: nn.Module, x: Tensor, lengths: Tensor) -> list[Tensor]:
    """Encoded utterances without their padding."""
    with torch.no_grad():
        y, y_lengths, _ = encoder(x, lengths)
    return [utterance[:length] for utterance, length in zip(y, y_lengths, strict=True)]


def encode(encoder: nn.Module, x: Tensor) -> Tensor:
    """(T, F) -> (T', D): encode one utterance."""
    return outputs(encoder, x[None], torch.tensor([len(x)]))[0]


def assert_close(got, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
