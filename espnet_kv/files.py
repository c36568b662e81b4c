"""Files and directories that appear whole or not at all, locks, and the commit of a checkout."""

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


@contextmanager
def new_directory(dst: Path) -> Iterator[Path]:
    """Yield an empty directory beside `dst` which replaces `dst` when the block succeeds.

    Paths stored inside the files must name `dst`, not the yielded directory.

    Raises:
        OSError: names `dst` where the system names no file.
    """
    # resolved, because `.` and `..` have no name
    partial = dst.resolve().with_name(f".{dst.resolve().name}.partial")
    with naming(dst):
        if partial.is_dir():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            if dst.is_dir():
                shutil.rmtree(dst)
            partial.rename(dst)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_entries(dst: Path) -> Iterator[Path]:
    """Yield an empty directory within `dst`, whose entries go into `dst` when the block succeeds.

    Entries of the same name are replaced, others in `dst` stay.

    Raises:
        OSError: names `dst` where the system names no file.
    """
    is_new, partial = not dst.exists(), dst / ".partial"
    with naming(dst):
        if partial.is_dir():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            for entry in sorted(partial.iterdir()):
                if (dst / entry.name).is_dir():
                    shutil.rmtree(dst / entry.name)
                entry.replace(dst / entry.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if is_new and not any(dst.iterdir()):
                dst.rmdir()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, of the same suffix, whose file replaces `path` on success.

    Raises:
        OSError: names `path` where the system names no file.
    """
    partial = path.with_name(f".partial.{path.name}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError without a file name, as of a write to a full disk, names `path`."""
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


def check_writable(path: Path) -> None:
    """Refuse a path at which nothing can be written, before the work for it is done.

    Raises:
        UserError: names the path and the directory above it that stands in the way.
    """
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if above == path and path.is_file():
        above = path.absolute().parent
    if not above.is_dir():
        raise UserError(f"{path}: {above} is no directory; name another path")
    if not os.access(above, os.W_OK):
        raise UserError(
            f"{path}: {above} cannot be written to; change its permissions, or name another path"
        )


@contextmanager
def locked(output: Path, command: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `output`, a hidden file beside it, which the kernel releases on any death.

    Args:
        command: what holds it, for the message that another run prints.
        wait: until another run has released it, which takes it a moment.

    Raises:
        UserError: another run holds it; names that run's process and command.
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
        # between open and flock the holder before us may have removed the file
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
    except (ValueError, KeyError):  # it has only just begun
        return "another run: wait for it to end, or stop it first"


PACKAGE = Path(__file__).parent


def commit(directory: Path = PACKAGE) -> str | None:
    """The commit of a directory's checkout, with -dirty where files differ from it.

    Args:
        directory: by default this package's.

    Returns:
        None outside git, and where the directory lies in a repository that does not track it.
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
