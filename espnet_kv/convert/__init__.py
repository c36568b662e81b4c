"""Conversion of trained multi-head attention to mla, gqa or linear attention."""

import importlib
from typing import Any

_EXPORTS = {
    "convert_model": "espnet_kv.convert.model",
    "factorize_kv": "espnet_kv.convert.factorize",
}
__all__ = ["convert_model", "factorize_kv"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'espnet_kv.convert' has no attribute {name!r}")
