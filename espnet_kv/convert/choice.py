"""Choice between conversions of one part to mla, by the error of the model on held-out audio."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.convert.budget import choose_ranks, predicted_errors
from espnet_kv.convert.factorize import to_mla, to_mla_by_second_moment
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.modules import in_place_of
from espnet_kv.convert.source import Part
from espnet_kv.convert.statistics import LayerStatistics

# names of the candidates in conversion.json
USUAL = "second moment, equal ranks"
EQUAL, SHARED = (
    "model output, keys x {:g}, equal ranks",
    "model output, keys x {:g}, ranks by layer",
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
    slots = [slot for slot in part.slots(model) if slot[0] in modules]
    before = [getattr(block, attribute) for _, block, attribute in slots]
    try:
        for name, block, attribute in slots:
            setattr(block, attribute, in_place_of(getattr(block, attribute), modules[name]))
        yield
    finally:
        for (_, block, attribute), module in zip(slots, before, strict=True):
            setattr(block, attribute, module)


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
) -> Choice:
    """Convert the layers of a part to mla by the candidate with the smallest error of the model.

    Candidates with equal ranks: the second moment of the frames, and the norm of the model's
    output (`metric`) with KEY_SCALES. With a budget also the best of these scales, with the ranks
    that minimise the sum of the predicted errors.

    Args:
        layers: name -> attention module and its statistics.
        rank: the same for every layer.
        budget: numbers per frame of all layers; None: only equal ranks.
        model_error: `ModelError.of`, for audio that is not in the statistics.
        step: called after each layer of a candidate.

    Raises:
        UserError, ConfigError: see `to_mla`.
    """
    choices: list[Choice] = []
    errors: dict[str, float] = {}

    metrics = {name: OutputMetric.of(*layer) for name, layer in layers.items()}

    def attempt(name: str, ranks: Mapping[str, int], scale: float | None = None) -> None:
        modules = {}
        for layer, (attention, statistics) in layers.items():
            if scale is None:
                new = to_mla_by_second_moment(attention, ranks[layer], statistics)
            else:
                metric = metrics[layer].with_keys_scaled(scale)
                new = to_mla(attention, ranks[layer], statistics, metric)
            modules[layer] = new
            step()
        errors[name] = model_error(modules)
        choices.append(Choice(modules, name, errors))

    equal = dict.fromkeys(layers, rank)
    attempt(USUAL, equal)
    for scale in KEY_SCALES:
        attempt(EQUAL.format(scale), equal, scale)
    if budget is not None:
        scale = min(KEY_SCALES, key=lambda scale: errors[EQUAL.format(scale)])
        predicted = {
            name: predicted_errors(*layer, metrics[name].with_keys_scaled(scale))
            for name, layer in layers.items()
        }
        attempt(SHARED.format(scale), choose_ranks(predicted, budget), scale)
    return min(choices, key=lambda choice: errors[choice.chosen])


def candidates(budget: int | None) -> int:
    """The number of candidates of `choose_mla`."""
    return 1 + len(KEY_SCALES) + (budget is not None)
