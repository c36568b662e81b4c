"""Names of a module that stand for other objects within a context."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_REPLACING = threading.RLock()


@contextmanager
def replaced(module: Any, **ours: Any) -> Iterator[Any]:
    """Yield a module in which names stand for other objects; one thread at a time.

    Names that the module lacks are removed again at the end.
    """
    with _REPLACING:
        names = vars(module)
        own = {name: names[name] for name in ours if name in names}
        names.update(ours)
        try:
            yield module
        finally:
            for name in ours:
                names.pop(name, None)
            names.update(own)
