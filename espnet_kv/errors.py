"""Mistakes a user can mend, told in one line."""

import errno
import sys

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


class ArgumentError(UserError, ValueError):
    """An argument of a call has a value that is not allowed; commands name the option `--name`.

    Args:
        name: of the argument.
        said: the value and what is allowed.
    """

    def __init__(self, name: str, said: str):
        super().__init__(name, said)

    def __str__(self) -> str:
        return " ".join(self.args)


class ConfigError(UserError, ValueError):
    """A key of a model configuration has a value that is not allowed."""


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
