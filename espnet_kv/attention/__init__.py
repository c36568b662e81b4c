"""Registry of the attention mechanisms by their name in a YAML.

A new mechanism needs a file here, a line in ATTENTIONS and a YAML. Importing does not load ESPnet.
"""

from collections.abc import Mapping
from typing import Any

import torch

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
