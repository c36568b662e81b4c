"""Commands in forks of the test process, which have ESPnet already loaded."""

import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Forked:
    """main(arguments) in a fork, with its standard streams at our ends of pipes (or as given).

    stdin, stdout, stderr: file descriptors for the child; None: a pipe, of which the other end
    is the attribute of the same name.
    """

    def __init__(
        self,
        main: Callable[[list[str]], Any],
        arguments: Sequence[str],
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ):
        given = (stdin, stdout, stderr)
        theirs, ours = [], []
        for n, end in enumerate(given):
            read, write = os.pipe() if end is None else (end, end)
            theirs.append(read if n == 0 else write)
            ours.append(write if n == 0 else read)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(main, list(arguments), theirs, ours, given)
        for n, end in enumerate(theirs):
            if given[n] is None:
                os.close(end)
        self.stdin = os.fdopen(ours[0], "wb", buffering=0, closefd=stdin is None)
        self.stdout = os.fdopen(ours[1], encoding="utf-8", closefd=stdout is None)
        self.stderr = os.fdopen(ours[2], encoding="utf-8", closefd=stderr is None)

    def _run(self, main, arguments, theirs, ours, given) -> None:
        status = 70
        signal.alarm(300)  # instead of waiting forever
        # the parent of the tests may ignore it, e.g. a shell in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.root.handlers.clear()  # pytest's handlers would prevent the command's
        logging.root.setLevel(logging.WARNING)  # as in a new process; other tests set levels
        try:
            for n in range(3):
                if given[n] is None:
                    os.close(ours[n])
                os.dup2(theirs[n], n)
            sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
            status = main(arguments) or 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)

    def finish(self, data: bytes = b"") -> subprocess.CompletedProcess:
        """Send `data`, close standard input and wait."""
        if data:
            self.stdin.write(data)
        self.stdin.close()
        out, err = self.stdout.read(), self.stderr.read()
        _, status = os.waitpid(self.pid, 0)
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), out, err)


def run(main, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess:
    """Run main(arguments) in a fork with `data` on standard input, and return its end."""
    return Forked(main, arguments).finish(data)


def run_module(words: list[str]) -> None:
    """What `python -m` does with these words."""
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run_script(words: list[str]) -> None:
    """What `python` does with these words, beginning with a file."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def assert_one_line(ended: subprocess.CompletedProcess, said: str) -> None:
    """Check for status 1 and one line on standard error that matches `said`."""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 1, ended.stderr
    assert len(errors) == 1 and ended.stderr.rstrip().endswith(errors[0]), ended.stderr
    assert "Traceback" not in ended.stderr
    assert re.search(said, errors[0]), errors[0]


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition becomes true in some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
