"""Tools for commands: parser, types of options, one-line errors, progress."""

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from tqdm import tqdm

from espnet_kv.errors import ArgumentError, UserError, explain, one_line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's formatter without the defaults None and []."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError; argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message} (see --help)")


def true_or_false(text: str) -> bool:
    """Type of an option with the values `true` and `false`, as in ESPnet."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Type of an option with integers from `least` to `most` (None: no upper limit)."""
    bounds = f"of {least} or more" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        # isdecimal and int() also accept the digits of other scripts
        number = int(text) if text.removeprefix("-").isdecimal() and len(text) < 100 else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return number

    return parse


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn `main` into a console command that prints user errors as one line on stderr.

    These are a UserError, an error of the file system, missing memory (status 1) and Ctrl-C
    (status 130). When standard output is closed, the command ends silently (status 141). Other
    exceptions are bugs and keep their traceback.

    The returned function returns the exit status, for `sys.exit(main())` and console scripts.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            message = one_line(error)
            if isinstance(error, ArgumentError):
                message = f"--{message}"
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            discard_output()
            return 141
        except Exception as error:
            text = explain(error)
            if text is None:
                raise
            message = text
        print(f"error: {message}", file=sys.stderr)
        return 1

    return run


def discard_output() -> None:
    """Redirect a closed standard output to /dev/null; Python would print an error at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


SHOWN = 20
"""Number of warnings of one kind that are printed; further ones are counted."""


def progress(label: str, total: int, *, initial: int = 0, unit: str = "it") -> tqdm:
    """A progress counter with the time left, on standard error.

    Args:
        total, initial: units of work in all, and units done by an earlier run.
        unit: "B" for bytes, shown as kB, MB...
    """
    return tqdm(
        desc=f"  {label}",
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,  # few lines in a log
        bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    )


def warn_each(label: str, reasons: Mapping[str, str], summary: str) -> None:
    """Print a warning on stderr for each utterance in `reasons`, then their number: `N SUMMARY`."""
    if not reasons:
        return
    for utt in itertools.islice(reasons, SHOWN):
        print(f"warning: {label}: {utt}: {reasons[utt]}", file=sys.stderr)
    if len(reasons) > SHOWN:
        print(f"warning: {label}: ... and {len(reasons) - SHOWN} more", file=sys.stderr)
    print(f"warning: {label}: {len(reasons)} {summary}", file=sys.stderr, flush=True)


def refuse_mostly_dropped(label: str, dropped: Mapping[str, str], total: int) -> None:
    """Stop if more than half of `total` utterances were dropped.

    Raises:
        UserError: probably a path or an option is wrong, and not a few files.
    """
    if 2 * len(dropped) > total:
        utt, reason = next(iter(dropped.items()))
        raise UserError(
            f"{label}: {len(dropped)} of {total} utterances cannot be used "
            f"(the first: {utt}: {reason}); check the paths in wav.scp and the transcripts"
        )
