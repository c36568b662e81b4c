"""What commands share: parser, types of options, one-line errors, progress."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from tqdm import tqdm

from espnet_kv.errors import ArgumentError, UserError, explain, one_line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's, without the defaults that say nothing to a user."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == []:
            return action.help
        return super()._get_help_string(action)


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


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Type of an option that is a whole number from `least` to `most` (None: any)."""
    bounds = f"of {least} or more" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        # isdecimal alone takes the digits of other scripts, of which int() makes numbers, too
        number = int(text) if text.removeprefix("-").isdecimal() and len(text) < 100 else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return number

    return parse


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn `main` into a console command: what a user can mend becomes one line on stderr.

    That is a UserError, a failure of the file system and missing memory (status 1) and Ctrl-C
    (status 130). Where nobody reads standard output any more, it ends without a word (status 141).
    Every other exception is a fault of the program and keeps its traceback.

    Returns a function that gives the exit status, so that both
    `sys.exit(main())` and console-script entry points work.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            said = one_line(error)
            if isinstance(error, ArgumentError):
                said = f"--{said}"
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
            said = text
        print(f"error: {said}", file=sys.stderr)
        return 1

    return run


def discard_output() -> None:
    """Send standard output nowhere: nobody reads it, and Python would complain at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


SHOWN = 20
"""Warnings of one kind are printed up to this many; the rest are counted."""


def progress(label: str, total: int, *, initial: int = 0, unit: str = "it") -> tqdm:
    """A counter with the time left, on standard error; `update()` counts, `close()` ends its line.

    Args:
        total, initial: what there is to do, and what an earlier run has done of it.
        unit: "B" counts bytes and shows them as kB, MB...
    """
    return tqdm(
        desc=f"  {label}",
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log gets few lines
        bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    )


def warn_each(label: str, reasons: Mapping[str, str], summary: str) -> None:
    """Warn on stderr of every utterance in `reasons`, then print how many: `N SUMMARY`."""
    if not reasons:
        return
    for utt in list(reasons)[:SHOWN]:
        print(f"warning: {label}: {utt}: {reasons[utt]}", file=sys.stderr)
    if len(reasons) > SHOWN:
        print(f"warning: {label}: ... and {len(reasons) - SHOWN} more", file=sys.stderr)
    print(f"warning: {label}: {len(reasons)} {summary}", file=sys.stderr, flush=True)


def refuse_mostly_dropped(label: str, dropped: Mapping[str, str], total: int) -> None:
    """Stop where more than half of `total` utterances were dropped.

    Raises:
        UserError: then a path or an option is wrong, not a few files.
    """
    if 2 * len(dropped) > total:
        utt, reason = next(iter(dropped.items()))
        raise UserError(
            f"{label}: {len(dropped)} of {total} utterances cannot be used "
            f"(the first: {utt}: {reason}); check the paths in wav.scp and the transcripts"
        )
