"""Names of our classes in configurations, as packed models write them."""

from collections.abc import Mapping
from typing import Any

REMARK = " (pip install espnet_kv; import espnet_kv)"
"""Stands behind the names of our classes in the config.yaml of a packed model.

ESPnet without this package names the choice that it does not know, and with it the remedy.
"""


def plain_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the names of its encoder and decoder without REMARK."""
    names = {key: config[key] for key in ("encoder", "decoder") if isinstance(config.get(key), str)}
    return {**config, **{key: name.removesuffix(REMARK) for key, name in names.items()}}
