"""Choice between conversions of one part to mla, by the error of the model on held-out audio."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.convert.budget import choose_ranks, predicted_errors
from espnet_kv.convert.factorize import to_mla, to_mla_by_second_moment, to_shared_mla
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import put_in_place
from espnet_kv.convert.source import Part
from espnet_kv.convert.statistics import LayerStatistics

# names of the candidates in conversion.json
USUAL = "second moment, equal ranks"
EQUAL, BY_LAYER = (
    "model output, keys x {:g}, equal ranks",
    "model output, keys x {:g}, ranks by layer",
)
ONE, EXACT = (
    "model output, keys x {:g}, one latent for all layers",
    "one latent for all layers, lossless",
)

# Factors of key errors in the norm of the model's output. Large key errors change the attention
# weights less than to first order, or more.
KEY_SCALES = (0.5, 1.0, 2.0)


class ModelError:
    """Error of a model's output with some of its attention modules replaced.

    encoder: E |y' - y|^2 / E |y - E y|^2. decoder: E KL(p || p'), in nats per token. Squared
        changes of log-probabilities would count all tokens of the vocabulary alike, while a search
        depends on the probable ones.

    Args:
        model, part: the part whose modules are replaced.
        run: runs the model on the same audio every time and returns the output of the part's
            module, (N, D) or log-probabilities (N, V).
    """

    def __init__(self, model: Any, part: Part, run: Callable[[], Tensor]):
        self._model, self._part, self._run = model, part, run
        self._expected = run()

    def of(self, modules: Mapping[str, Any]) -> float:
        """The error with `modules`, name -> replacement."""
        with replaced(self._model, self._part, modules):
            actual = self._run()
        y, error = self._expected, actual - self._expected
        if self._part.module == "decoder":
            # rounding makes the divergence of equal distributions slightly negative
            return max(0.0, float(-(y.exp() * error).sum(dim=-1).double().mean()))
        spread = (y - y.mean(dim=0)).square().sum()
        return float(error.square().sum() / spread.clamp(min=torch.finfo(y.dtype).tiny))


@contextmanager
def replaced(model: Any, part: Part, modules: Mapping[str, Any]) -> Iterator[None]:
    """Context manager within which `modules` (name -> module) stand in the model."""
    slots = part.slots(model)
    before = put_in_place(slots, modules)
    try:
        yield
    finally:
        put_in_place(slots, before)


@dataclass
class Choice:
    """The conversion of a part that was chosen.

    modules: name -> module of each layer. chosen: key of errors.
    errors: candidate -> error of the model (`ModelError`).
    """

    modules: dict[str, MultiHeadLatentAttention]
    chosen: str
    errors: dict[str, float]


def choose_mla(
    layers: Mapping[str, tuple[Any, LayerStatistics]],
    rank: int,
    budget: int | None,
    model_error: Callable[[Mapping[str, Any]], float],
    step: Callable[[], object] = lambda: None,
    shared_rank: int | None = None,
) -> Choice:
    """Convert the layers of a part to mla by the candidate with the smallest error of the model.

    Candidates with equal ranks: the second moment of the frames, and the norm of the model's
    output (`metric`) with KEY_SCALES. With a budget also the best of these scales, with the ranks
    that minimise the sum of the predicted errors. With a shared rank, one latent for all layers
    takes the place of those in the norm of the output; if it is lossless, there is no other
    candidate.

    Args:
        layers: name -> attention module and its statistics.
        rank: the same for every layer.
        budget: numbers per frame of all layers; None: only equal ranks.
        model_error: `ModelError.of`, for audio that is not in the statistics.
        step: called after each layer of a candidate.
        shared_rank: see `Target.shared_rank`.

    Raises:
        UserError, ConfigError: see `to_mla`.
    """
    choices: list[Choice] = []
    errors: dict[str, float] = {}

    def attempt(name: str, modules: Mapping[str, MultiHeadLatentAttention]) -> None:
        errors[name] = model_error(modules)
        choices.append(Choice(dict(modules), name, errors))

    attentions = [attention for attention, _ in layers.values()]

    def together(
        rank: int, known: list[tuple[LayerStatistics, OutputMetric]] | None = None
    ) -> dict[str, Any]:
        modules = dict(zip(layers, to_shared_mla(attentions, rank, known), strict=True))
        for _ in layers:
            step()
        return modules

    if shared_rank is not None and shared_rank >= attentions[0].n_feat:
        attempt(EXACT, together(shared_rank))
        return choices[0]
    metrics = {name: OutputMetric.of(*layer) for name, layer in layers.items()}

    def separate(ranks: Mapping[str, int], scale: float | None = None) -> dict[str, Any]:
        modules = {}
        for layer, (attention, statistics) in layers.items():
            if scale is None:
                new = to_mla_by_second_moment(attention, ranks[layer], statistics)
            else:
                metric = metrics[layer].with_keys_scaled(scale)
                new = to_mla(attention, ranks[layer], statistics, metric)
            modules[layer] = new
            step()
        return modules

    equal = dict.fromkeys(layers, rank)
    attempt(USUAL, separate(equal))
    for scale in KEY_SCALES:
        if shared_rank is None:
            attempt(EQUAL.format(scale), separate(equal, scale))
        else:
            known = [
                (statistics, metrics[name].with_keys_scaled(scale))
                for name, (_, statistics) in layers.items()
            ]
            attempt(ONE.format(scale), together(shared_rank, known))
    if budget is not None and shared_rank is None:
        scale = min(KEY_SCALES, key=lambda scale: errors[EQUAL.format(scale)])
        predicted = {
            name: predicted_errors(*layer, metrics[name].with_keys_scaled(scale))
            for name, layer in layers.items()
        }
        attempt(BY_LAYER.format(scale), separate(choose_ranks(predicted, budget), scale))
    return min(choices, key=lambda choice: errors[choice.chosen])


def candidates(budget: int | None, shared_rank: int | None = None, size: int = 0) -> int:
    """The number of candidates of `choose_mla` in a model of this size."""
    if shared_rank is not None:
        return 1 if shared_rank >= size else 1 + len(KEY_SCALES)
    return 1 + len(KEY_SCALES) + (budget is not None)
