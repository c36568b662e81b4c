"""The decoder kv_transformer."""

from collections.abc import Mapping
from typing import Any

import torch
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from torch import Tensor

from espnet_kv.attention import replace_attention
from espnet_kv.attention.base import Attention, HeadSizes, share_one_state
from espnet_kv.attention.positions import at_positions
from espnet_kv.decoder.cached import CachedDecoder, check_places, shares_latent
from espnet_kv.espnet.loading import refuse_partial_loads
from espnet_kv.espnet.signatures import complete_arguments, with_arguments_of


@with_arguments_of(TransformerDecoder)
class KVTransformerDecoder(CachedDecoder, TransformerDecoder):
    """ESPnet's TransformerDecoder with a key/value cache in search.

    Parameters and training are ESPnet's; with mha for both attentions its checkpoints load. In
    search, keys and values (or latents, or sums) are computed once per token, and once per
    utterance for the encoder output. ESPnet's decoder caches layer outputs and projects the whole
    prefix and the whole encoder output again at every token.

    Shape letters: V vocabulary, D model size, and those of CachedDecoder.

    Args:
        vocab_size: V.
        encoder_output_size: D.
        self_attention_type, src_attention_type: mha, gqa, mla or linear, for self-attention and
            for cross-attention to the encoder output.
        self_attention_conf, src_attention_conf: their options; a list holds one value per block.
            With shared_latent: true, src mla caches one latent for all blocks.
        espnet_conf: the arguments of ESPnet's class. use_sdpa and use_flash_attn have no effect.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
    """

    def __init__(
        self,
        vocab_size: int,
        encoder_output_size: int,
        attention_heads: int = 4,
        self_attention_type: str = "mha",
        self_attention_conf: Mapping[str, Any] | None = None,
        src_attention_type: str = "mha",
        src_attention_conf: Mapping[str, Any] | None = None,
        **espnet_conf: Any,
    ):
        HeadSizes(attention_heads, encoder_output_size)
        confs = {
            "self": (self_attention_type, dict(self_attention_conf or {})),
            "src": (src_attention_type, dict(src_attention_conf or {})),
        }
        espnet = complete_arguments("decoder_conf", type(self), TransformerDecoder, espnet_conf)
        layer_conf = check_places(confs, espnet["num_blocks"])
        super().__init__(vocab_size, encoder_output_size, attention_heads, **espnet_conf)
        for index, layer in enumerate(self.decoders):
            for place, (kind, _) in confs.items():
                attention = replace_attention(
                    layer,
                    f"{place}_attn",
                    kind,
                    layer_conf[place][index],
                    attention_heads,
                    encoder_output_size,
                    espnet[f"{place}_attention_dropout_rate"],
                    rel_pos=False,
                    qk_norm=espnet["qk_norm"],
                )
                attention.state_index, attention.cross = index, place == "src"
        if shares_latent(confs["src"][1]):
            share_one_state(self.src_attentions)
        # ESPnet loads with strict=False and would keep random attention weights
        self.load_guard = refuse_partial_loads(self)

    @property
    def self_attentions(self) -> list[Attention]:
        return [layer.self_attn for layer in self.decoders]

    @property
    def src_attentions(self) -> list[Attention]:
        return [layer.src_attn for layer in self.decoders]

    def embed_tokens(self, tokens: Tensor, position: int) -> Tensor:
        *layers, encoding = self.embed
        x = tokens  # (N, L), or (N, L, mels) with another input layer
        for layer in layers:
            x = layer(x)
        last = position + tokens.size(1)
        return at_positions(encoding, x, torch.arange(position, last, device=x.device))

    def run_layers(self, x: Tensor) -> Tensor:
        for layer in self.decoders:
            x = layer(x, None, x, None)[0]
        return x

    def token_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.after_norm(x) if self.normalize_before else x
        if self.output_layer is None:
            return hidden, hidden
        return torch.log_softmax(self.output_layer(hidden), dim=-1), hidden
