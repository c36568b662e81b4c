"""The language model kv_transformer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from espnet2.lm.transformer_lm import TransformerLM
from torch import Tensor, nn

from espnet_kv.attention import replace_attention
from espnet_kv.attention.positions import at_positions
from espnet_kv.cache.step import active_step
from espnet_kv.decoder.cached import check_cached
from espnet_kv.decoder.search import Hypothesis, TokenSearch, transpose_weights
from espnet_kv.errors import ConfigError
from espnet_kv.espnet.loading import refuse_partial_loads
from espnet_kv.espnet.signatures import complete_arguments, with_arguments_of


@with_arguments_of(TransformerLM)
class KVTransformerLM(TransformerLM):
    """ESPnet's TransformerLM with a key/value cache in search.

    Parameters and training are ESPnet's; with mha its checkpoints load. In search, keys and values
    (or latents, or sums) are computed once per token. ESPnet's language model caches layer outputs
    and projects the whole prefix again at every token. As in ESPnet's, token 0 (<blank>, padding)
    is visible to no token.

    Shape letters: N hypotheses, B utterances, K = N / B, L tokens, V vocabulary, D = att_unit.

    Args:
        vocab_size: V.
        att_unit: D.
        head: attention heads.
        attention_type: mha, gqa, mla or linear.
        attention_conf: its options; a list holds one value per layer.
        espnet_conf: the other arguments of ESPnet's class.

    Attributes:
        cache_dtype: number format of the cache, see `espnet_kv.cache.codec`; None: the model's.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
    """

    def __init__(
        self,
        vocab_size: int,
        att_unit: int = 256,
        head: int = 2,
        attention_type: str = "mha",
        attention_conf: Mapping[str, Any] | None = None,
        **espnet_conf: Any,
    ):
        conf = dict(attention_conf or {})
        espnet = complete_arguments("lm_conf", type(self), TransformerLM, espnet_conf)
        if head < 1 or att_unit % head:
            raise ConfigError(f"lm_conf.head: {head} does not divide att_unit {att_unit}")
        if espnet["pos_enc"] not in (None, "sinusoidal"):
            raise ConfigError(
                f"lm_conf.pos_enc: unknown {espnet['pos_enc']!r} (allowed: null, sinusoidal)"
            )
        each = check_cached(attention_type, conf, espnet["layer"])
        super().__init__(vocab_size, att_unit=att_unit, head=head, **espnet_conf)
        dropout = espnet["attention_dropout_rate"]
        for index, layer in enumerate(self.encoder.encoders):
            attention = replace_attention(
                layer, "self_attn", attention_type, each[index], head, att_unit, dropout, False
            )
            attention.state_index = index
        self.cache_dtype: str | None = None
        # ESPnet loads with strict=False and would keep random attention weights
        self.load_guard = refuse_partial_loads(self)

    def prepare_search(self) -> None:
        """Call `transpose_weights` before decoding."""
        transpose_weights(self)

    def init_state(self, x: Tensor | None) -> Hypothesis:
        """Create the empty hypothesis; x: (T, D_x) encoder output."""
        return self.batch_init_state(x)

    def batch_init_state(self, x: Tensor | None) -> Hypothesis:
        """Create the empty hypothesis for a search in (T, D_x) or (B, T, D_x) encoder output."""
        batch_size = x.size(0) if x is not None and x.dim() == 3 else 1
        attentions = [layer.self_attn for layer in self.encoder.encoders]
        weight = self.encoder.after_norm.weight  # not quantised
        search = TokenSearch(attentions, batch_size, self.cache_dtype, weight.dtype, weight.device)
        return search.first()

    def score(
        self, y: Tensor, state: Hypothesis | None, x: Tensor | None
    ) -> tuple[Tensor, Hypothesis]:
        """Score the next token of one hypothesis (ESPnet's ScorerInterface).

        Args:
            y: (L,) tokens. state: state before the last token; None: none was made. x: not used.

        Returns:
            (V,) log-probabilities and the new state.
        """
        scores, (state,) = self.batch_score(y[None], [state], None)
        return scores[0], state

    @torch.no_grad()
    def batch_score(
        self, ys: Tensor, states: Sequence[Hypothesis | None], xs: Tensor | None
    ) -> tuple[Tensor, list[Hypothesis]]:
        """Score the next token of every hypothesis (ESPnet's BatchScorerInterface).

        Args:
            ys: (N, L) tokens; the hypotheses of an utterance are consecutive.
            states: states before the last token; None: none were made.
            xs: not used.

        Returns:
            (N, V) log-probabilities and N new states.
        """
        first = states[0] or self.batch_init_state(None)
        hypotheses = [first if state is None else state for state in states]
        search = first.search
        exist = ys != 0
        for position in range(len(first.path), ys.size(1)):  # a primer has more than one
            x = self._embed(ys[:, position], position).view(search.batch_size, -1, self._size)
            step, paths = search.begin(hypotheses, exist=exist[:, : position + 1])
            with active_step(step):
                for layer in self.encoder.encoders:
                    x = layer(x, None)[0]  # (B, K, D)
            hypotheses = search.end(step, paths)
        hidden = self.encoder.after_norm(x.flatten(0, 1))  # (N, D)
        return torch.log_softmax(self.decoder(hidden), dim=-1), hypotheses

    @property
    def _size(self) -> int:
        """D."""
        return self.encoder.after_norm.weight.numel()

    def _embed(self, tokens: Tensor, position: int) -> Tensor:
        """Embed (N,) tokens at one position -> (N, D)."""
        *layers, encoding = self.encoder.embed
        x = self.embed(tokens)
        for layer in layers:
            x = layer(x)
        if isinstance(encoding, nn.Sequential):  # no positions: ESPnet's identity
            return x
        return at_positions(encoding, x, torch.tensor(position, device=x.device))
