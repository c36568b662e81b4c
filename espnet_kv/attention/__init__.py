"""Registry of the attention mechanisms by their name in a YAML.

A new mechanism needs a file here, a line in ATTENTIONS and a YAML. Importing does not load ESPnet.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from espnet_kv.attention.base import Attention, HeadSizes
from espnet_kv.attention.grouped import GroupedQueryAttention, MultiHeadAttention
from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.attention.linear import LinearAttention
from espnet_kv.errors import ConfigError

ATTENTIONS: dict[str, type[Attention]] = {
    "mha": MultiHeadAttention,
    "gqa": GroupedQueryAttention,
    "mla": MultiHeadLatentAttention,
    "linear": LinearAttention,
}


def check_attention(attention_type: str, attention_conf: Mapping[str, Any]) -> type[Attention]:
    """Return the class of `attention_type` after checking the keys of attention_conf.

    Raises:
        ConfigError (a ValueError): unknown attention_type, or a key that it does not accept.
    """
    if attention_type not in tuple(ATTENTIONS):
        raise ConfigError(
            f"attention_type: unknown {attention_type!r} (allowed: {', '.join(ATTENTIONS)})"
        )
    attention = ATTENTIONS[attention_type]
    for key in attention_conf:
        if key not in attention.options:
            allowed = ", ".join(attention.options) or "nothing"
            raise ConfigError(
                f"attention_conf.{key}: {attention_type} does not take it (allowed: {allowed})"
            )
    return attention


def layer_confs(attention_conf: Mapping[str, Any], layers: int) -> list[dict[str, Any]]:
    """Options of each layer. A list holds one value per layer; other values apply to all layers.

    Args:
        attention_conf: e.g. {kv_rank: [64, 48, 48, 32]}.
        layers: number of blocks of the encoder or decoder, with or without attention.

    Raises:
        ConfigError (a ValueError): the length of a list is not `layers`.
    """
    for key, value in attention_conf.items():
        if isinstance(value, list | tuple) and len(value) != layers:
            raise ConfigError(
                f"attention_conf.{key}: {len(value)} values for {layers} layers (allowed: one "
                "value, or a list of one per layer)"
            )
    return [
        {k: v[n] if isinstance(v, list | tuple) else v for k, v in attention_conf.items()}
        for n in range(layers)
    ]


def build_attention(
    attention_type: str,
    attention_conf: Mapping[str, Any],
    n_head: int,
    n_feat: int,
    dropout_rate: float = 0.0,
    rel_pos: bool = True,
    **espnet_options: Any,
) -> Attention:
    """Build one attention module.

    Args:
        attention_type: a key of ATTENTIONS.
        attention_conf: options of this attention.
        n_head: attention heads H.
        n_feat: model size D.
        dropout_rate: dropout on the attention weights.
        rel_pos: use relative positions (ESPnet's "latest").
        espnet_options: options of ESPnet's attention (zero_triu, qk_norm); false is always allowed.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
    """
    attention = check_attention(attention_type, attention_conf)
    for key, value in espnet_options.items():
        if value and key not in attention.espnet_options:
            raise ConfigError(f"{key}: {value!r} does not go with attention_type {attention_type}")
    taken = {k: v for k, v in espnet_options.items() if k in attention.espnet_options}
    return attention(HeadSizes(n_head, n_feat), dropout_rate, rel_pos, **taken, **attention_conf)


def replace_attention(
    block: nn.Module, slot: str, attention_type: str, *args: Any, **kw: Any
) -> Attention:
    """Replace the attention module of an ESPnet block.

    mha takes over the weights of ESPnet's module and draws no random numbers, so that a model with
    mha starts with the weights that ESPnet's model has for the same seed.

    Args:
        block: the block.
        slot: its attribute that holds ESPnet's attention module.
        attention_type, args, kw: see `build_attention`.

    Returns:
        The new module.

    Raises:
        ConfigError (a ValueError): see `build_attention`.
    """
    if attention_type == "mha":
        with torch.device("meta"):
            attention = build_attention(attention_type, *args, **kw)
        attention.load_state_dict(getattr(block, slot).state_dict(), assign=True)
    else:
        attention = build_attention(attention_type, *args, **kw)
    setattr(block, slot, attention)
    return attention


def attention_like(
    attention_type: str, attention_conf: Mapping[str, Any], n_head: int, n_feat: int
) -> Attention:
    """Build an attention module on the meta device, for its `label` and `footprint`.

    Args:
        attention_type, attention_conf, n_head, n_feat: see `build_attention`.

    Raises:
        ConfigError (a ValueError): see `build_attention`.
    """
    with torch.device("meta"):
        return build_attention(attention_type, attention_conf, n_head, n_feat)


def attention_label(model: nn.Module, cross: bool = False) -> str:
    """The label of a model's attention modules: one, or several where its layers differ.

    Labels that differ in numbers alone become one with ranges: mla r32-64.

    Args:
        model: an encoder or decoder.
        cross: whether the modules that attend to encoded utterances are meant.
    """
    modules = [m for m in model.modules() if isinstance(m, Attention) and m.cross is cross]
    labels = list(dict.fromkeys(module.label for module in modules))
    parts = [re.split(r"(\d+(?:\.\d+)?)", label) for label in labels]
    if len({(*words[::2],) for words in parts}) != 1:
        return ", ".join(labels) or "no attention"
    merged = list(parts[0])
    for place in range(1, len(merged), 2):
        numbers = sorted({words[place] for words in parts}, key=float)
        merged[place] = "-".join(dict.fromkeys((numbers[0], numbers[-1])))
    return "".join(merged)
