"""Choice between conversions of one part to mla, by the error of the model on held-out audio."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from espnet_kv.convert.budget import choose_ranks, predicted_errors
from espnet_kv.convert.calls import Call
from espnet_kv.convert.factorize import SECOND_MOMENT, Fit, fit_mla
from espnet_kv.convert.modules import in_place_of
from espnet_kv.convert.source import Part
from espnet_kv.convert.statistics import LayerStatistics

# names of the candidates in conversion.json
USUAL = f"{SECOND_MOMENT}, equal ranks"
EQUAL, SHARED = "best fit of each layer, equal ranks", "best fit of each layer, ranks by effect"


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

    fits: name -> conversion of each layer. chosen: key of errors.
    errors: candidate -> error of the model (`ModelError`).
    """

    fits: dict[str, Fit]
    chosen: str
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, Any]:
        """Name -> module of each layer."""
        usual = self.chosen == USUAL
        return {n: fit.second_moment if usual else fit.module for n, fit in self.fits.items()}

    @property
    def methods(self) -> dict[str, str]:
        """Name -> method of each layer."""
        usual = self.chosen == USUAL
        return {n: SECOND_MOMENT if usual else fit.chosen for n, fit in self.fits.items()}


def choose_mla(
    layers: Mapping[str, tuple[Any, LayerStatistics]],
    unseen: Mapping[str, Sequence[Call]],
    rank: int,
    budget: int | None,
    model_error: Callable[[Mapping[str, Any]], float],
    step: Callable[[], object] = lambda: None,
) -> Choice:
    """Convert the layers of a part to mla by the candidate with the smallest error of the model.

    With a budget, one candidate has a rank for each layer. Its effects, which weight the predicted
    errors (`choose_ranks`), are the errors of the model with one converted layer at a time: the
    error of a layer has directions in which the model is more sensitive than to noise.

    Args:
        layers: name -> attention module and its statistics.
        unseen: name -> calls that are not in the statistics.
        rank: the same for every layer.
        budget: numbers per frame of all layers; None: only equal ranks.
        model_error: `ModelError.of`.
        step: called after each layer of a candidate.

    Raises:
        UserError: see `fit_mla`.
    """

    equal = {}
    for name, (attention, statistics) in layers.items():
        equal[name] = fit_mla(attention, rank, statistics, unseen[name])
        step()
    choices = [Choice(equal, EQUAL), Choice(equal, USUAL)]
    if budget is not None:
        weighted = {
            name: _measured(layer, equal[name], rank, model_error({name: equal[name].module}))
            for name, layer in layers.items()
        }
        shared = {}
        for name, wanted in choose_ranks(weighted, budget).items():
            attention, statistics = layers[name]
            method = equal[name].method
            shared[name] = fit_mla(attention, wanted, statistics, unseen[name], method)
            step()
        choices.append(Choice(shared, SHARED))
    errors = {choice.chosen: model_error(choice.modules) for choice in choices}
    best = min(choices, key=lambda choice: errors[choice.chosen])
    best.errors = errors
    return best


def _measured(layer: tuple[Any, LayerStatistics], fit: Fit, rank: int, error: float) -> list[float]:
    """Predicted errors at rank 0, 1, ..., D, multiplied so that `error` is the one at `rank`."""
    predicted = predicted_errors(*layer, fit.method.metric(*layer))
    effect = error / max(predicted[rank], torch.finfo(torch.float64).tiny)
    return [effect * value for value in predicted]
