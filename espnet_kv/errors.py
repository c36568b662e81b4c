"""Mistakes a user can mend, told in one line."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Bad input: the message names the file, key or option and the way out.

    Commands print it as one line and exit with status 1 (see `command`); library
    callers catch it like any exception.
    """


class ConfigError(UserError, ValueError):
    """A key of a model configuration has a value that is not allowed."""


class Parser(argparse.ArgumentParser):
    """A parser of options: what is wrong is a UserError, where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message} (see --help)")


def true_or_false(text: str) -> bool:
    """Type of an option that is `true` or `false`, as ESPnet's are."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def whole(least: int) -> Callable[[str], int]:
    """Type of an option that is a whole number of `least` or more."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn `main` into a console command: a UserError becomes one line on stderr.

    Returns a function that gives the exit status, so that both
    `sys.exit(main())` and console-script entry points work.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run
