"""Search with a decoder that caches keys and values."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from espnet_kv.attention import check_attention, layer_confs
from espnet_kv.attention.base import Attention
from espnet_kv.cache.step import active_step
from espnet_kv.decoder.search import Hypothesis, Search, transpose_weights
from espnet_kv.errors import ConfigError

SHARED = "shared_latent"
"""Option of src_attention_conf: cross-attention of all layers caches one latent."""


class CachedDecoder:
    """Mixin for an ESPnet decoder class: ESPnet's scorer interfaces with the cache of `Search`.

    It must come before the ESPnet class in the bases. Attention modules must be `Attention`s with
    their `state_index` and `cross`.

    Shape letters: N hypotheses, B utterances, K = N / B, L tokens, T encoder frames, V vocabulary,
    D model size.

    Attributes:
        cache_dtype: see `espnet_kv.cache.codec`; None: the model's type.
    """

    cache_dtype: str | None = None
    modules: Any

    @property
    @abstractmethod
    def self_attentions(self) -> list[Attention]:
        """The self-attention module of each block."""

    @property
    @abstractmethod
    def src_attentions(self) -> list[Attention]:
        """The cross-attention module of each block."""

    @abstractmethod
    def embed_tokens(self, tokens: Tensor, position: int) -> Tensor:
        """Embed tokens (N, L), of which the first is at `position` -> (N, L, D)."""

    @abstractmethod
    def run_layers(self, x: Tensor) -> Tensor:
        """Call the blocks with x (B, K L, D), while a step of `Search` is active."""

    @abstractmethod
    def token_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) from the blocks -> log-probabilities (N, V) and hidden states (N, D)."""

    def prepare_search(self) -> None:
        """Call `transpose_weights` before decoding."""
        transpose_weights(self)  # type: ignore[arg-type]

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
        position, length = len(states[0].path), ys.size(1)
        most = search.tokens_per_step or length
        while position < length:  # a primer has more than one token
            tokens = ys[:, position : position + most]
            x = self.embed_tokens(tokens, position)  # (N, l, D)
            step, paths = search.begin(states, tokens.size(1))
            with active_step(step):
                # the l tokens of the K hypotheses of an utterance are the rows of its chunk
                x = self.run_layers(x.reshape(search.batch_size, -1, x.size(-1))).view(x.shape)
            states = search.end(step, paths)
            position += tokens.size(1)
        scores, hidden = self.token_scores(x[:, -1])
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


def check_cached(
    attention_type: str, attention_conf: Mapping[str, Any], layers: int
) -> list[dict[str, Any]]:
    """Check the attention arguments of a decoder or language model.

    Returns:
        The options of each layer.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
    """
    check_attention(attention_type, attention_conf)
    confs = layer_confs(attention_conf, layers)
    if attention_conf.get("decay") is not None:
        raise ConfigError("attention_conf.decay: works in encoders only")
    return confs


def check_places(
    places: Mapping[str, tuple[str, Mapping[str, Any]]], layers: int
) -> dict[str, list[dict[str, Any]]]:
    """Check the attention arguments of a decoder.

    Args:
        places: self and src -> attention_type and attention_conf.
        layers: number of blocks.

    Returns:
        The options of each layer, by place; without SHARED.

    Raises:
        ConfigError (a ValueError): names the key, its value and the allowed values.
    """
    found = {}
    for place, (kind, conf) in places.items():
        try:
            own = own_options(conf) if place == "src" else conf
            found[place] = check_cached(kind, own, layers)
            if shares_latent(conf) and place == "src":
                _check_shared(kind, own, found[place])
        except ConfigError as error:
            raise ConfigError(f"{place}_{error}") from error
    return found


def shares_latent(src_attention_conf: Mapping[str, Any]) -> bool:
    """The value of SHARED.

    Raises:
        ConfigError (a ValueError): it is neither true nor false.
    """
    value = src_attention_conf.get(SHARED, False)
    if not isinstance(value, bool):
        raise ConfigError(f"attention_conf.{SHARED}: {value!r} (allowed: true, false)")
    return value


def own_options(src_attention_conf: Mapping[str, Any]) -> dict[str, Any]:
    """The options of each module: all but SHARED, which is of the decoder."""
    return {key: value for key, value in src_attention_conf.items() if key != SHARED}


def _check_shared(kind: str, conf: Mapping[str, Any], layers: Sequence[Mapping]) -> None:
    if not check_attention(kind, conf).can_share_state:
        raise ConfigError(f"attention_conf.{SHARED}: true does not go with attention_type {kind}")
    for key in conf:
        if any(layer[key] != layers[0][key] for layer in layers):
            raise ConfigError(f"attention_conf.{SHARED}: true: give one {key}, not one per layer")
