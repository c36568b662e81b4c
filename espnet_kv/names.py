"""Names of our classes in configurations, as packed models write them."""

from collections.abc import Mapping
from typing import Any

REMARK = " (pip install espnet_kv; import espnet_kv)"
"""Stands behind the names of our classes in the config.yaml of a packed model.

ESPnet without this package names the choice that it does not know, and with it the remedy.
"""

NAMED = ("encoder", "decoder", "lm")
"""Keys of configurations that may name our classes."""


def plain_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the names of its classes without REMARK."""
    names = {key: config[key] for key in NAMED if isinstance(config.get(key), str)}
    return {**config, **{key: name.removesuffix(REMARK) for key, name in names.items()}}
