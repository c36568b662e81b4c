"""One budget of numbers per frame, divided among layers by what each loses.

Shape letters: D model size.
"""

from collections.abc import Mapping

from espnet_kv.attention.mha import MultiHeadAttention
from espnet_kv.convert.factorize import error_spectrum
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.errors import UserError


def choose_ranks(
    layers: Mapping[str, tuple[MultiHeadAttention, LayerStatistics]],
    budget: int,
    effects: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """A rank for each layer, together no more than `budget`, each at least 1 and at most D.

    The predicted error of a layer at rank r is the sum of its `error_spectrum` beyond r, times its
    effect. That is convex in r, so taking the largest entries of all spectra, one after another,
    is optimal; more budget never lowers a rank.

    Args:
        effects: of an error of each layer's output on the model's (`measure_effects`); None: the
            error of every layer counts by its share of what that layer puts out.

    Raises:
        UserError: budget below one number per layer.
    """
    if budget < len(layers):
        raise UserError(
            f"a cache of {budget} numbers per frame is too small for {len(layers)} layers: each "
            "needs at least 1"
        )
    spectra = {name: error_spectrum(*layer) for name, layer in layers.items()}
    weights = {
        name: 1 / max(float(s.sum()), 1e-300) if effects is None else effects[name]
        for name, s in spectra.items()
    }
    ranks = dict.fromkeys(layers, 1)
    gains = [
        (-weights[name] * float(gain), place, rank, name)
        for place, (name, spectrum) in enumerate(spectra.items())
        for rank, gain in enumerate(spectrum[1:])
    ]
    for *_, name in sorted(gains)[: budget - len(layers)]:
        ranks[name] += 1
    return ranks
