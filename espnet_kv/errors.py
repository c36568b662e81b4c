"""Errors that a user can fix, with messages of one line."""

import errno
import sys

# error number of a system call -> how to fix it
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
# messages of torch when memory is exhausted on a CPU, for which it has no exception class
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflowed",
    "Out of memory on",
)


class UserError(Exception):
    """Bad input; the message names the file, key or option and how to fix it.

    Commands print it as one line and exit with status 1 (see `espnet_kv.cli.command`).
    """


class ArgumentError(UserError, ValueError):
    """An argument has a value that is not allowed; commands print it as the option `--name`.

    Args:
        name: name of the argument.
        problem: the value and the allowed values.
    """

    def __init__(self, name: str, problem: str):
        super().__init__(name, problem)

    def __str__(self) -> str:
        return " ".join(self.args)


class ConfigError(UserError, ValueError):
    """A key of a model configuration has a value that is not allowed."""


def one_line(error: object) -> str:
    """The text of an error without line breaks; spaces within a line, e.g. in a path, are kept."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether CPU or GPU memory was exhausted."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # None: torch was not imported
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def explain(error: BaseException) -> str | None:
    """One line for an error of the file system or missing memory; None for other exceptions."""
    if isinstance(error, OSError):
        if error.errno is None:
            return one_line(error)
        paths = " -> ".join(str(p) for p in (error.filename, error.filename2) if p is not None)
        message = f"{paths}: {error.strerror}" if paths else str(error.strerror)
        way_out = WAYS_OUT.get(error.errno)
        return one_line(f"{message}: {way_out}" if way_out else message)
    if is_out_of_memory(error):
        what = one_line(error).removeprefix("[").split(". ")[0]
        return (
            f"out of memory ({what or 'the system gave no more'}): use shorter audio, smaller "
            "numbers in the options, a smaller model or a machine with more memory"
        )
    return None
