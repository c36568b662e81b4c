"""Mistakes a user can mend, told in one line."""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# what a failed system call asks for; its own text says what happened
WAYS_OUT = {
    errno.ENOSPC: "free space there, or write to another disk",
    errno.EDQUOT: "free space there, or write to another disk",
    errno.EROFS: "write to a directory on a disk that can be written to",
    errno.EACCES: "change the permissions, or name another path",
    errno.EPERM: "change the permissions, or name another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; name another path",
    errno.EISDIR: "it is a directory; name a file",
    errno.EEXIST: "remove it, or name another path",
    errno.ENOTEMPTY: "remove it, or name another path",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory",
}
# how torch says on a CPU that memory is missing; it has no class of its own for that
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflowed",
    "Out of memory on",
)


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


def one_line(error: object) -> str:
    """The text of an error without line breaks; spaces within a line, e.g. of a path, stay."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, that of the CPU or that of a GPU."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # where it was not imported it cannot have failed
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def explain(error: BaseException) -> str | None:
    """One line for a failure of the machine: a file, memory; None for any other exception."""
    if isinstance(error, OSError):
        if error.errno is None:
            return one_line(error)
        paths = " -> ".join(str(p) for p in (error.filename, error.filename2) if p is not None)
        said = f"{paths}: {error.strerror}" if paths else str(error.strerror)
        way_out = WAYS_OUT.get(error.errno)
        return one_line(f"{said}: {way_out}" if way_out else said)
    if is_out_of_memory(error):
        what = one_line(error).removeprefix("[").split(". ")[0]
        return (
            f"out of memory ({what or 'the system gave no more'}): use shorter audio, smaller "
            "numbers in the options, a smaller model or a machine with more memory"
        )
    return None


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
