"""Atomic writing of files and directories, locks, and the commit of a checkout."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from espnet_kv.errors import UserError

PARTIAL = ".partial"
"""How names of files and directories begin that are being written inside their directory."""


@contextmanager
def new_directory(dst: Path) -> Iterator[Path]:
    """Yield an empty directory beside `dst`, which replaces `dst` when the block succeeds.

    Paths stored inside the files must name `dst`, not the yielded directory.

    Raises:
        OSError: names `dst` if the system names no file.
    """
    # resolved, because `.` and `..` have no name
    with _partial_directory(dst.resolve().with_name(f".{dst.resolve().name}.partial"), dst) as new:
        yield new
        if dst.is_dir():
            shutil.rmtree(dst)
        new.rename(dst)


@contextmanager
def new_entries(dst: Path) -> Iterator[Path]:
    """Yield an empty directory in `dst`; its entries are moved to `dst` when the block succeeds.

    Entries of the same name are replaced; other entries of `dst` are kept.

    Raises:
        OSError: names `dst` if the system names no file.
    """
    is_new = not dst.exists()
    with _partial_directory(dst / PARTIAL, dst) as new:
        try:
            yield new
            for entry in sorted(new.iterdir()):
                if (dst / entry.name).is_dir():
                    shutil.rmtree(dst / entry.name)
                entry.replace(dst / entry.name)
        finally:
            if is_new and [*dst.iterdir()] == [new]:
                shutil.rmtree(dst)


@contextmanager
def _partial_directory(partial: Path, dst: Path) -> Iterator[Path]:
    """Yield an empty directory, of which nothing is left at the end; see `naming` for `dst`."""
    with naming(dst):
        if partial.is_dir():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path with the same suffix beside `path`; its file replaces `path` on success.

    Raises:
        OSError: names `path` if the system names no file.
    """
    partial = path.with_name(f"{PARTIAL}.{path.name}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError without a file name, e.g. from a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, replacing the file in one step."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def placed(text: str, begin: str, end: str, block: str, path: Path) -> str:
    """`text`, which is the content of `path`, with `block` in place of all between two markers.

    Without markers, `block` is added at the end between new ones.

    Raises:
        UserError: one marker is missing or a marker is there twice.
    """
    whole = f"{begin}\n{block}\n{end}"
    marks = text.count(begin), text.count(end)
    if marks == (0, 0):
        return f"{text.rstrip()}\n\n{whole}\n".lstrip()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if marks != (1, 1) or not found:
        raise UserError(f"{path}: keep one line {begin} and below it one line {end}, or neither")
    return before + whole + after


def read_text(path: Path | str) -> str:
    """The text of a file in UTF-8.

    Raises:
        UserError: it is missing or not in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None


def check_writable(path: Path) -> None:
    """Check before long work that its output path can be written to.

    Raises:
        UserError: names the path and the directory that cannot be written to.
    """
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if above == path and path.is_file():
        above = path.absolute().parent
    if not above.is_dir():
        raise UserError(f"{path}: {above} is not a directory; name another path")
    if not os.access(above, os.W_OK):
        raise UserError(
            f"{path}: {above} cannot be written to; change its permissions, or name another path"
        )


@contextmanager
def locked(output: Path, command: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `output`, a hidden file beside it. The kernel releases it with the process.

    Args:
        command: command line of this run, for the message in another run.
        wait: wait until another run has released the lock.

    Raises:
        UserError: another run holds the lock; names its process and command.
    """
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                raise UserError(f"{output} is being made by {_holder(file)}") from None
        # the previous holder may have removed the file between open and flock
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "command": command}, file)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _holder(file) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return (
            f"another run, process {holder['pid']} on {holder['host']} ({holder['command']}): "
            "wait for it to end, or stop it first"
        )
    except (ValueError, KeyError):  # the holder has not written it yet
        return "another run: wait for it to end, or stop it first"


PACKAGE = Path(__file__).parent


def commit(directory: Path = PACKAGE) -> str | None:
    """The commit of a directory's checkout, with -dirty if files were changed.

    Args:
        directory: by default the directory of this package.

    Returns:
        None outside git, or if the repository does not track the directory.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files"):
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None
