"""Target of a conversion: attention type and size, and the resulting options of each layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from espnet_kv.attention import ATTENTIONS
from espnet_kv.convert.source import Part
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
        """Whether there is one budget for all layers of a part."""
        return self.attention_type == "mla" and self.target_compression is not None

    def budget(self, attentions: Mapping[str, Any]) -> int | None:
        """Numbers per frame of all layers of a part, if they share them; else None.

        Raises:
            UserError: it is less than one number per layer.
        """
        if not self.shares_a_budget:
            return None
        numbers = sum(2 * attention.n_feat for attention in attentions.values())
        budget = round((1 - (self.target_compression or 0.0)) * numbers)
        if budget < len(attentions):
            message = f"{self.target_compression}: the rank would be below 1; choose less"
            raise ArgumentError("target_compression", message)
        return budget

    def shared_rank(self, part: Part, attentions: Mapping[str, Any]) -> int | None:
        """Size of one latent for all layers of cross-attention; None: each layer has its own.

        A latent of the model size is lossless, so more of the budget is not used.

        Raises:
            UserError: see `budget`.
        """
        budget = self.budget(attentions) if part.is_cross else None
        return None if budget is None else min(budget, next(iter(attentions.values())).n_feat)


def layer_options(target: Target, attentions: Mapping[str, Any]) -> dict[str, Any]:
    """attention_conf of the layers of a part, the same for all.

    Args:
        attentions: name -> MultiHeadAttention.

    Raises:
        UserError: the target compression is not possible.
    """
    if target.attention_type == "linear":
        return {"feature_map": target.feature_map or "hedgehog"}
    if target.attention_type == "gqa":
        heads = target.num_kv_heads
        if heads is None:
            first = next(iter(attentions.values()))
            heads = _remaining_heads(first.h, target.target_compression or 0.0)
        return {"num_kv_heads": heads}
    if (budget := target.budget(attentions)) is not None:
        size = next(iter(attentions.values())).n_feat  # this rank is lossless
        return {"kv_rank": min(size, budget // len(attentions))}
    return {"kv_rank": target.kv_rank}


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
