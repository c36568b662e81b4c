"""The decoder kv_transformer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from torch import Tensor

from espnet_kv.attention import check_attention, layer_confs, replace_attention
from espnet_kv.attention.base import HeadSizes
from espnet_kv.attention.positions import at_positions
from espnet_kv.cache.step import active_step
from espnet_kv.decoder.search import Hypothesis, Search, transpose_weights
from espnet_kv.errors import ConfigError
from espnet_kv.espnet.loading import refuse_partial_loads
from espnet_kv.espnet.signatures import complete_arguments, with_arguments_of


@with_arguments_of(TransformerDecoder)
class KVTransformerDecoder(TransformerDecoder):
    """ESPnet's TransformerDecoder with a key/value cache in search.

    Parameters and training are ESPnet's; with mha for both attentions its checkpoints load. In
    search, keys and values (or latents, or sums) are computed once per token, and once per
    utterance for the encoder output. ESPnet's decoder caches layer outputs and projects the whole
    prefix and the whole encoder output again at every token.

    Shape letters: N hypotheses, B utterances, K = N / B, L tokens, V vocabulary, D model size.

    Args:
        vocab_size: V.
        encoder_output_size: D.
        self_attention_type, src_attention_type: mha, gqa, mla or linear, for self-attention and
            for cross-attention to the encoder output.
        self_attention_conf, src_attention_conf: their options; a list holds one value per block.
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
        layer_conf = {}
        for place, (kind, conf) in confs.items():
            try:
                check_attention(kind, conf)
                layer_conf[place] = layer_confs(conf, espnet["num_blocks"])
            except ConfigError as error:
                raise ConfigError(f"{place}_{error}") from error
            if conf.get("decay") is not None:
                raise ConfigError(f"{place}_attention_conf.decay: works in encoders only")
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
        self.cache_dtype: str | None = None
        # ESPnet loads with strict=False and would keep random attention weights
        self.load_guard = refuse_partial_loads(self)

    def prepare_search(self) -> None:
        """Call `transpose_weights` before decoding."""
        transpose_weights(self)

    def init_state(self, x: Tensor) -> Hypothesis:
        """Create the empty hypothesis for encoder output x (T, D)."""
        return self.batch_init_state(x)

    def batch_init_state(self, x: Tensor, xs_lengths: Tensor | None = None) -> Hypothesis:
        """Create the empty hypothesis for one utterance (T, D) or several (B, T, D).

        xs_lengths: (B,), frames of each utterance; None: T.
        """
        x = x[None] if x.dim() == 2 else x
        mask = None
        if xs_lengths is not None and int(min(xs_lengths)) < x.size(1):
            frames = torch.arange(x.size(1), device=x.device)
            mask = (frames < xs_lengths.to(x.device)[:, None])[:, None]  # (B, 1, T)
        return Search(self, x, mask).first()

    def score(self, ys: Tensor, state: Hypothesis | None, x: Tensor, return_hs: bool = False):
        """Score the next token of one hypothesis (ESPnet's ScorerInterface).

        Args:
            ys: (L,) tokens. state: state before the last token. x: (T, D).

        Returns:
            (V,) log-probabilities, with return_hs also the hidden state (D,), and the new state.
        """
        scores, (state,) = self.batch_score(ys[None], [state], x[None], return_hs)
        if return_hs:
            return scores[0][0], scores[1][0], state
        return scores[0], state

    @torch.no_grad()
    def batch_score(
        self,
        ys: Tensor,
        states: Sequence[Hypothesis | None],
        xs: Tensor,
        return_hs: bool = False,
        xs_mask: Tensor | None = None,
    ):
        """Score the next token of every hypothesis (ESPnet's BatchScorerInterface).

        Args:
            ys: (N, L) tokens; the hypotheses of an utterance are consecutive.
            states: states before the last token.
            xs: (N, T, D), the encoder output of each hypothesis.
            xs_mask: (N, 1, T), frames that exist; None: all.

        Returns:
            (N, V) log-probabilities, with return_hs also hidden states (N, D), and N new states.
        """
        states = self._current_states(states, xs, xs_mask)
        search = states[0].search
        for position in range(len(states[0].path), ys.size(1)):  # a primer has more than one
            x = self._embed(ys[:, position], position).view(search.batch_size, -1, xs.size(-1))
            step, paths = search.begin(states)
            with active_step(step):
                for layer in self.decoders:
                    x = layer(x, None, x, None)[0]  # (B, K, D)
            states = search.end(step, paths)
        hidden = x.flatten(0, 1)  # (N, D)
        if self.normalize_before:
            hidden = self.after_norm(hidden)
        scores = hidden
        if self.output_layer is not None:
            scores = torch.log_softmax(self.output_layer(hidden), dim=-1)
        return ((scores, hidden) if return_hs else scores), states

    def _current_states(
        self, states: Sequence[Hypothesis | None], xs: Tensor, xs_mask: Tensor | None
    ) -> list[Hypothesis]:
        """The states, after creating missing ones and updating a changed encoder output."""
        first = states[0]
        if first is not None and first.search.frames == xs.size(1):
            return list(states)  # type: ignore[arg-type]
        if first is not None and len(first.path):
            each = slice(None, None, len(xs) // first.search.batch_size)
            first.search.replace_memory(xs[each], None if xs_mask is None else xs_mask[each])
            return list(states)  # type: ignore[arg-type]
        # ESPnet expands one utterance to a view per hypothesis, but copies several
        if xs.stride(0) == 0 or len(xs) == 1:
            xs, xs_mask = xs[:1], None if xs_mask is None else xs_mask[:1]
        return [Search(self, xs, xs_mask).first()] * len(states)

    def _embed(self, tokens: Tensor, position: int) -> Tensor:
        """Embed (N,) tokens at one position, or (N, mels) inputs -> (N, D)."""
        *layers, encoding = self.embed
        x = tokens
        for layer in layers:
            x = layer(x)
        return at_positions(encoding, x, torch.tensor(position, device=x.device))
