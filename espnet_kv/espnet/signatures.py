"""Signatures of classes that add arguments to those of an ESPnet class."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from espnet_kv.errors import ConfigError

Class = TypeVar("Class", bound=type)


def with_arguments_of(espnet_class: type, own: type | None = None) -> Callable[[Class], Class]:
    """Class decorator: add ESPnet's arguments to the signature.

    ESPnet reads signatures for --print_config and for the config.yaml that it writes.

    Args:
        espnet_class: class whose arguments are accepted as **espnet_conf.
        own: the class that defines __init__; None: the decorated class.
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
    """All arguments of the ESPnet class: the given values and the defaults.

    Args:
        conf_name: key of the configuration that holds `given`, e.g. encoder_conf.
        cls: our class, decorated by `with_arguments_of`.
        espnet_class: the ESPnet class.
        given: the given arguments.

    Raises:
        ConfigError (a ValueError): the ESPnet class has no such argument.
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
