"""KV-cache compression for ESPnet speech recognition.

Importing the package registers its classes with ESPnet (see `espnet_kv.espnet.register`). The
import does not load torch and ESPnet; the first use of a name in `__all__` does.
"""

import importlib
from typing import Any

from espnet_kv.espnet.register import register

__version__ = "0.1.0"

_EXPORTS = {
    "ASRTask": "espnet_kv.espnet.task",
    "EncoderState": "espnet_kv.cache.stream",
    "StreamingBatch": "espnet_kv.streaming.batch",
    "StreamingRecognizer": "espnet_kv.streaming.recognizer",
}
__all__ = ["ASRTask", "EncoderState", "StreamingBatch", "StreamingRecognizer", "register"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'espnet_kv' has no attribute {name!r}")


register()
