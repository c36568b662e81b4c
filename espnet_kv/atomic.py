"""Results that appear whole or not at all, however a run ends."""

import os
import shutil
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
