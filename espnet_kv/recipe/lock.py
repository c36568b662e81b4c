"""One run at a time for each output."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from espnet_kv.errors import UserError


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
