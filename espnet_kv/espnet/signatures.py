"""Classes that take arguments of their own and those of the ESPnet class that they extend."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from espnet_kv.errors import ConfigError

Class = TypeVar("Class", bound=type)


def with_arguments_of(espnet_class: type, own: type | None = None) -> Callable[[Class], Class]:
    """Class decorator: tools that look at signatures see ESPnet's arguments too.

    ESPnet's --print_config is one, and so are the config.yaml files that it writes.

    Args:
        espnet_class: whose arguments the class takes as **espnet_conf.
        own: the class that defines __init__; None: the decorated one.
    """

    def decorate(cls: Class) -> Class:
        ours = [p for p in _parameters(own or cls) if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in ours}
        theirs = [p for p in _parameters(espnet_class) if p.name not in names]
        cls.__signature__ = inspect.Signature(ours + theirs)  # type: ignore[attr-defined]
        return cls

    return decorate


def complete_arguments(
    conf_name: str, cls: type, espnet_class: type, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Every argument of the ESPnet class with the value it will get.

    Args:
        conf_name: the part of the configuration that `given` comes from, e.g. encoder_conf.
        cls: ours, decorated by `with_arguments_of`.
        espnet_class: the class behind it.
        given: the arguments for it that are given.

    Raises:
        ConfigError (a ValueError): it takes no such argument.
    """
    defaults = {p.name: p.default for p in _parameters(espnet_class)}
    for key in given:
        if key not in defaults:
            raise ConfigError(
                f"{conf_name}.{key}: {cls.__name__} has no such argument (allowed: "
                f"{', '.join(inspect.signature(cls).parameters)})"
            )
    return defaults | dict(given)


def _parameters(cls: type) -> list[inspect.Parameter]:
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
