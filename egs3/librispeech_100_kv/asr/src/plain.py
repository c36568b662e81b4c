"""Errors that a user can mend, in one line."""

import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from espnet3.contract.stages import StageContractError
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from espnet_kv.errors import UserError, explain, one_line

MENDABLE = (StageContractError, HydraException, OmegaConfBaseException, yaml.YAMLError)


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that ends the program with one line where a user can mend what went wrong.

    ESPnet3 logs the traceback of every exception of a stage, but not of SystemExit. Any other
    exception is a fault of the program and stays as it is.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            if (said := reason(error)) is None:
                raise
            raise SystemExit(f"error: {said}") from error

    return run


def reason(error: Exception) -> str | None:
    """What a user is told of an exception; None: it is a fault of the program."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return one_line(cause)
    if isinstance(error, MENDABLE) or _raised_by_espnet3(error):
        return one_line(error)
    return explain(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _raised_by_espnet3(error: Exception) -> bool:
    """Whether a check of ESPnet3 refuses something: its last frame is there, and says why."""
    if not isinstance(error, RuntimeError | ValueError | FileNotFoundError | AssertionError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return bool(str(error)) and frame.f_globals.get("__name__", "").startswith("espnet3.")
