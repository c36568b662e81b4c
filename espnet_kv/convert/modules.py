"""New attention modules that take over what a conversion leaves as it was."""

from typing import Any

import torch
from torch import nn

from espnet_kv.attention.base import Attention, HeadSizes
from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.errors import UserError


def successor[T: Attention](source: MultiHeadAttention, kind: type[T], **conf: Any) -> T:
    """An attention of another kind with every parameter of `source` that it has too.

    Raises:
        UserError: source normalises its queries and keys, so its keys are no linear map.
        ConfigError: conf is not allowed.
    """
    refuse_normed_keys(source)
    if source.zero_triu and "zero_triu" not in kind.espnet_options:
        raise UserError("zero_triu: true does not go with an attention without positions")
    sizes = HeadSizes(source.h, source.linear_q.in_features)
    options: dict[str, Any] = {"zero_triu": True} if source.zero_triu else {}
    new = kind(sizes, source.dropout_rate, source.rel_pos, **options, **conf)
    new.to(source.linear_q.weight)
    if hasattr(source, "state_index"):
        new.state_index = source.state_index
    own = new.state_dict()
    with torch.no_grad():
        for name, tensor in source.state_dict().items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)
    return new.train(source.training)


def refuse_normed_keys(source: MultiHeadAttention) -> None:
    """Raise a UserError where keys are no linear map of the frames."""
    if not isinstance(source.k_norm, nn.Identity):
        raise UserError(
            "qk_norm: true normalises keys after their projection, which only attention_type mha "
            "does: such a layer cannot be converted"
        )


def head_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(H d_k, n) -> (H, d_k, n), in float64."""
    return weight.detach().double().unflatten(0, (heads, -1))
