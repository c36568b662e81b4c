"""Construction of the attention modules that replace those of the source model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from espnet_kv.attention.base import Attention, HeadSizes, share_one_state
from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.attention.whisper import NAMES, WhisperAttention, whisper_class
from espnet_kv.errors import UserError


def replacement_module[T: Attention](source: MultiHeadAttention, kind: type[T], **conf: Any) -> T:
    """Build a module of class `kind` with a copy of all parameters that `source` has as well.

    Raises:
        UserError: `kind` does not support qk_norm or zero_triu of `source`.
        ConfigError: `conf` is not allowed.
    """
    refuse_normed_keys(source)
    if source.zero_triu and "zero_triu" not in kind.espnet_options:
        raise UserError(
            "zero_triu: true is not supported by an attention without relative positions"
        )
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


def is_whisper(module: Any) -> bool:
    """Whether a module has the parameter names and the call of openai-whisper's attention."""
    return isinstance(module, WhisperAttention)


def plain_attention(attention: Any) -> MultiHeadAttention:
    """`attention`, of a Whisper model a copy with ESPnet's parameter names and call."""
    if not is_whisper(attention):
        return attention
    sizes = HeadSizes(attention.h, attention.n_feat)
    new = MultiHeadAttention(sizes, 0.0, False).to(attention.linear_q.weight)
    state = {ours: getattr(attention, ours).state_dict() for ours in NAMES}
    state["linear_k"]["bias"] = torch.zeros_like(attention.linear_q.bias)
    for ours, tensors in state.items():
        getattr(new, ours).load_state_dict(tensors)
    return new.train(attention.training)


def in_place_of(old: Any, new: Any) -> Any:
    """`new` with the parameter names and the call of `old`, which it replaces in a model.

    A bias of the keys is dropped in a Whisper model; mla and gqa have none, or zeros.
    """
    if not is_whisper(old) or is_whisper(new):
        return new
    conf = {name: getattr(new, name) for name in new.options}
    kind: Any = type(new)
    whisper = whisper_class(kind)(HeadSizes(new.h, new.n_feat), **conf)
    whisper.to(new.linear_q.weight)
    state = {}
    for key, tensor in new.state_dict().items():
        module, _, rest = key.partition(".")
        if key != "linear_k.bias":
            state[f"{NAMES.get(module, module)}.{rest}"] = tensor
    whisper.load_state_dict(state)
    whisper.state_index, whisper.cross = old.state_index, old.cross
    return whisper.train(old.training)


def put_in_place(
    slots: Iterable[tuple[str, nn.Module, str]], modules: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace attention modules of a model by `in_place_of`.

    Args:
        slots: see `Part.slots`.
        modules: name -> replacement.

    Returns:
        Name -> module that was there.
    """
    before, sharing = {}, []
    for name, block, attribute in slots:
        if name in modules:
            before[name] = getattr(block, attribute)
            new = in_place_of(before[name], modules[name])
            setattr(block, attribute, new)
            if getattr(modules[name], "shares_state", False):
                sharing.append(new)
    share_one_state(sharing)  # those of Whisper models are copies
    return before


def refuse_normed_keys(source: MultiHeadAttention) -> None:
    """Raise a UserError if keys are not a linear map of the frames (qk_norm)."""
    if not isinstance(source.k_norm, nn.Identity):
        raise UserError(
            "qk_norm: true: keys are normalised after their projection, which only attention_type "
            "mha supports, so this layer cannot be converted"
        )


def head_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(H d_k, n) -> (H, d_k, n), in float64."""
    return weight.detach().double().unflatten(0, (heads, -1))
