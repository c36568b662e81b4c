"""Target of a conversion: attention type and size, and the resulting options of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espnet_kv.attention import ATTENTIONS
from espnet_kv.convert.budget import choose_ranks
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.errors import ArgumentError


@dataclass(frozen=True)
class Target:
    """Attention type and size after the conversion.

    Args:
        attention_type: mla, gqa or linear.
        kv_rank, num_kv_heads, feature_map: options of mla, gqa and linear, respectively.
        target_compression: fraction of the attention cache to remove, in (0, 1); replaces kv_rank
            or num_kv_heads.
        transfer_steps: linear: training steps of attention transfer.

    Raises:
        UserError: options are missing or cannot be combined.
    """

    attention_type: str
    kv_rank: int | None = None
    num_kv_heads: int | None = None
    feature_map: str | None = None
    target_compression: float | None = None
    transfer_steps: int = 300

    def __post_init__(self) -> None:
        kind, options = self.attention_type, ATTENTIONS[self.attention_type].options
        for name in ("kv_rank", "num_kv_heads", "feature_map"):
            if getattr(self, name) is not None and name not in options:
                raise ArgumentError(name, f"does not apply to attention_type {kind}")
        fraction = self.target_compression
        if kind == "linear":
            if fraction is not None:
                message = f"{fraction} does not apply: linear attention has a fixed state size"
                raise ArgumentError("target_compression", message)
            return
        size = "kv_rank" if kind == "mla" else "num_kv_heads"
        if (fraction is None) == (getattr(self, size) is None):
            raise ArgumentError(
                "attention_type", f"{kind}: give either {size} or target_compression"
            )
        if fraction is not None and not 0 < fraction < 1:
            raise ArgumentError(
                "target_compression",
                f"{fraction}: the fraction of the cache to remove, more than 0 and less than 1",
            )

    @property
    def shares_a_budget(self) -> bool:
        """Whether each layer gets its own rank, from one budget for all layers."""
        return self.attention_type == "mla" and self.target_compression is not None


def layer_options(
    target: Target,
    attentions: Mapping[str, Any],
    statistics: Mapping[str, LayerStatistics],
    effects: Mapping[str, float] | None,
) -> dict[str, dict[str, Any]]:
    """attention_conf of each layer of a part.

    Args:
        attentions: name -> MultiHeadAttention.
        statistics: of the layers; empty without audio. effects: from `measure_effects`, or None.

    Raises:
        UserError: the target compression is not possible.
    """
    if target.attention_type == "linear":
        return {name: {"feature_map": target.feature_map or "hedgehog"} for name in attentions}
    first = next(iter(attentions.values()))
    if target.attention_type == "gqa":
        heads = target.num_kv_heads
        if heads is None:
            heads = _remaining_heads(first.h, target.target_compression or 0.0)
        return {name: {"num_kv_heads": heads} for name in attentions}
    if target.kv_rank is not None:
        return {name: {"kv_rank": target.kv_rank} for name in attentions}
    numbers = [2 * a.h * a.d_k for a in attentions.values()]
    budget = round((1 - (target.target_compression or 0.0)) * sum(numbers))
    if not statistics:
        rank = budget // len(numbers)
        if rank < 1:
            message = f"{target.target_compression}: the rank would be below 1; choose less"
            raise ArgumentError("target_compression", message)
        return {name: {"kv_rank": rank} for name in attentions}
    layers = {name: (attention, statistics[name]) for name, attention in attentions.items()}
    ranks = choose_ranks(layers, budget, effects)
    return {name: {"kv_rank": ranks[name]} for name in attentions}


def _remaining_heads(heads: int, fraction: float) -> int:
    allowed = {1 - g / heads: g for g in range(1, heads) if heads % g == 0}
    for removed, remaining in allowed.items():
        if abs(removed - fraction) < 1e-6:
            return remaining
    listed = ", ".join(f"{removed:g}" for removed in sorted(allowed)) or "none"
    raise ArgumentError(
        "target_compression",
        f"{fraction}: not possible with {heads} heads (allowed: {listed})",
    )
