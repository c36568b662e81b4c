"""Small language models, ESPnet's and ours."""

from typing import Any

import torch
from espnet2.lm.transformer_lm import TransformerLM
from small_decoders import ATTENTIONS, VOCABULARY

from espnet_kv.lm.transformer_lm import KVTransformerLM

SIZES = {"embed_unit": 12, "att_unit": 16, "head": 4, "unit": 24, "layer": 2}
OFF = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"pos_enc": "sinusoidal"},
    {"head": 2, "layer": 1},
    {"att_unit": 32, "head": 8, "layer": 4},
]


def build(cls=KVTransformerLM, **conf: Any) -> torch.nn.Module:
    """A language model with weights far from their initialisation, in eval mode."""
    model = cls(VOCABULARY, **SIZES | OFF | conf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pair(**conf: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """ESPnet's language model and ours with its state dict, loaded strictly."""
    stock, ours = build(TransformerLM, **conf), build(**conf)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def of(attention: str) -> dict[str, Any]:
    kind, conf = ATTENTIONS[attention]
    return {"attention_type": kind, "attention_conf": conf}
