"""The decoder kv_whisper."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from espnet2.asr.decoder.whisper_decoder import ExpandedTokenEmbedding, OpenAIWhisperDecoder
from torch import Tensor, nn
from torch.nn import functional

from espnet_kv.attention.base import Attention, share_one_state
from espnet_kv.attention.whisper import replace_whisper_attention
from espnet_kv.decoder.cached import CachedDecoder, check_places, shares_latent
from espnet_kv.decoder.search import Hypothesis, transpose_weights
from espnet_kv.errors import ConfigError, UserError
from espnet_kv.espnet.loading import refuse_partial_loads
from espnet_kv.espnet.openai_whisper import replace_norms, whisper_for_espnet


class KVWhisperDecoder(CachedDecoder, OpenAIWhisperDecoder):
    """ESPnet's OpenAIWhisperDecoder (arXiv 2212.04356) with a key/value cache in search.

    Parameters and training are ESPnet's; with mha for both attentions its checkpoints load. In
    search, keys and values are computed once per token, and once per utterance for the encoder
    output. ESPnet's decoder computes the whole prefix and projects the whole encoder output again
    at every token.

    Shape letters: V vocabulary, D model size, and those of CachedDecoder.

    Args:
        vocab_size: V.
        encoder_output_size: D.
        dropout_rate: as ESPnet's.
        whisper_model, download_dir, dims: see `espnet_kv.espnet.whisper_weights.load_whisper`.
        load_origin_token_embedding: keep the trained embeddings when V is larger than theirs.
        self_attention_type, src_attention_type: mha, gqa, mla or linear, for self-attention and
            for cross-attention to the encoder output.
        self_attention_conf, src_attention_conf: their options; a list holds one value per block.
            With shared_latent: true, src mla caches one latent for all blocks.

    Attributes:
        dims: the dimensions of the Whisper model.
        text_positions: tokens that a hypothesis can have before its last one.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
        UserError: openai-whisper is not installed, or the weights cannot be read.
    """

    def __init__(
        self,
        vocab_size: int,
        encoder_output_size: int,
        dropout_rate: float = 0.0,
        whisper_model: str | None = "small",
        download_dir: str | None = None,
        load_origin_token_embedding: bool = False,
        dims: Mapping[str, int] | None = None,
        self_attention_type: str = "mha",
        self_attention_conf: Mapping[str, Any] | None = None,
        src_attention_type: str = "mha",
        src_attention_conf: Mapping[str, Any] | None = None,
    ):
        with whisper_for_espnet(dims) as loaded:
            try:
                super().__init__(
                    vocab_size,
                    encoder_output_size,
                    dropout_rate,
                    whisper_model or "",
                    download_dir,
                    load_origin_token_embedding,
                )
            except AssertionError as error:
                raise ConfigError(f"load_origin_token_embedding: {error}") from error
        self.dims = loaded[-1]
        replace_norms(self)
        size = self.dims["n_text_state"]
        if size != encoder_output_size:
            raise ConfigError(
                f"whisper_model: {whisper_model} has a decoder of size {size}, but the encoder's "
                f"output has size {encoder_output_size}"
            )
        places = {
            "self": (self_attention_type, dict(self_attention_conf or {})),
            "src": (src_attention_type, dict(src_attention_conf or {})),
        }
        confs = check_places(places, len(self.decoders.blocks))
        for index, block in enumerate(self.decoders.blocks):
            for place, slot in (("self", "attn"), ("src", "cross_attn")):
                conf = confs[place][index]
                attention = replace_whisper_attention(block, slot, places[place][0], conf)
                attention.state_index, attention.cross = index, place == "src"
        if shares_latent(places["src"][1]):
            share_one_state(self.src_attentions)
        self.text_positions = len(self.decoders.positional_embedding)
        # ESPnet loads with strict=False and would keep random attention weights
        self.load_guard = refuse_partial_loads(self)

    def forward(
        self, hs_pad: Tensor, hlens: Tensor, ys_in_pad: Tensor, ys_in_lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ESPnet's forward.

        Raises:
            UserError: a text has more tokens than there are positions.
        """
        self._check_length(ys_in_pad.size(1))
        return super().forward(hs_pad, hlens, ys_in_pad, ys_in_lens)

    def forward_one_step(
        self,
        tgt: Tensor,
        tgt_mask: Tensor,
        memory: Tensor,
        *,
        cache: Sequence[Hypothesis | None] | None = None,
    ) -> tuple[Tensor, list[Hypothesis]]:
        """Score the next token of (N, L) prefixes.

        Args:
            tgt: (N, L) tokens. tgt_mask: not used. memory: (N, T, D).
            cache: the states of an earlier call; None: the prefixes are new.

        Returns:
            (N, V) log-probabilities and N states.
        """
        return self.batch_score(tgt, cache or [None] * len(tgt), memory)

    def batch_init_state(self, x: Tensor, xs_lengths: Tensor | None = None) -> Hypothesis:
        if self._is_padded_to_window(x):
            xs_lengths = None
        return super().batch_init_state(x.to(self._dtype), xs_lengths)

    def batch_score(
        self,
        ys: Tensor,
        states: Sequence[Hypothesis | None],
        xs: Tensor,
        return_hs: bool = False,
        xs_mask: Tensor | None = None,
    ):
        """See CachedDecoder; xs of 30 s has no mask.

        Raises:
            UserError: the hypotheses have more tokens than there are positions.
        """
        self._check_length(ys.size(1))
        if self._is_padded_to_window(xs):
            xs_mask = None
        return super().batch_score(ys, states, xs.to(self._dtype), return_hs, xs_mask)

    @property
    def self_attentions(self) -> list[Attention]:
        return [block.attn for block in self.decoders.blocks]

    @property
    def src_attentions(self) -> list[Attention]:
        return [block.cross_attn for block in self.decoders.blocks]

    def embed_tokens(self, tokens: Tensor, position: int) -> Tensor:
        positions = self.decoders.positional_embedding[position : position + tokens.size(1)]
        return self.decoders.token_embedding(tokens) + positions

    def run_layers(self, x: Tensor) -> Tensor:
        for block in self.decoders.blocks:
            x = block(x, x)  # the memory is in the step
        return x

    def token_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.decoders.ln(x)
        embedding = self.decoders.token_embedding
        parts = [embedding]
        if isinstance(embedding, ExpandedTokenEmbedding):  # its weight is a new copy at each use
            parts = [embedding.ori_emb, embedding.add_emb]
        logits = [functional.linear(hidden, part.weight) for part in parts]
        return torch.log_softmax(torch.cat(logits, dim=-1).float(), dim=-1), hidden

    def prepare_search(self) -> None:
        """As CachedDecoder, and the embeddings: their product gives the logits."""
        transpose_weights(self, (nn.Linear, nn.Embedding))

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoders.positional_embedding.dtype

    def _is_padded_to_window(self, xs: Tensor) -> bool:
        """Whether xs (..., T, D) is of a whole window of 30 s.

        Whisper is trained on such windows, whose silence is visible to cross-attention.
        """
        return xs.size(-2) == self.dims["n_audio_ctx"]

    def _check_length(self, tokens: int) -> None:
        if tokens > self.text_positions:
            raise UserError(
                f"{tokens} tokens are more than the {self.text_positions} positions of Whisper's "
                "decoder: leave such texts out of the training, or give a maxlenratio in decoding"
            )
