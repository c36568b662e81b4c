"""Reading the log of a running job: epochs, warnings, and the reason of a failure."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

# message of ESPnet's trainer before it stops early with status 0
ALL_INVALID = re.compile(r"The gradients at all steps are invalid in this epoch.*?(\d+)epoch")
_RESULTS = re.compile(r"\b(\d+)epoch results: (.*)")
_ERROR = re.compile(r"(?:[\w./-]+: )?error: (?P<message>.+)")
_RAISED = re.compile(r"(?P<name>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")
_LONGEST = 400  # characters of a reason


@dataclass(frozen=True)
class Epoch:
    """Results of an epoch from ESPnet's trainer: section (train, valid) -> name -> number."""

    number: int
    results: dict[str, dict[str, str]]

    def __str__(self) -> str:
        message = []
        for section in ("train", "valid"):
            if loss := self.results.get(section, {}).get("loss"):
                message.append(f"{section} loss {loss}")
        if accuracy := self.results.get("valid", {}).get("acc"):
            message.append(f"accuracy {accuracy}")
        return ", ".join(message)

    def not_finite(self) -> str:
        """A message such as `train loss is nan`; empty if the losses are finite."""
        for section in ("train", "valid"):
            loss = self.results.get(section, {}).get("loss", "0")
            if not math.isfinite(float(loss)):
                return f"{section} loss is {loss}"
        return ""


def parse_epoch(line: str) -> Epoch | None:
    """The results of an epoch in a line of a log; None: the line has none."""
    found = _RESULTS.search(line)
    if found is None:
        return None
    sections = re.findall(r"\[(\w+)\] ([^\[]*)", found[2])
    results = {
        section: dict(re.findall(r"([^\s,=]+)=([^\s,]+)", text)) for section, text in sections
    }
    return Epoch(int(found[1]), results)


class JobLog:
    """The part of a log written by one job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._read = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> list[str]:
        """Complete lines written since the last call."""
        lines, _, _ = self._bytes(self._read).rpartition(b"\n")
        if not lines:
            return []
        self._read += len(lines) + 1
        return lines.decode("utf-8", errors="replace").split("\n")

    def reason(self) -> str:
        """The last error or exception in the log, in one line."""
        return _last_error(self._bytes(self._start))

    def _bytes(self, start: int) -> bytes:
        if not self.path.exists():
            return b""
        with self.path.open("rb") as log:
            log.seek(start)
            return log.read()


def _last_error(text: bytes) -> str:
    lines = text.decode("utf-8", errors="replace").split("\n")
    for n in reversed(range(len(lines))):
        if found := _ERROR.match(lines[n]):
            return _shorten(found["message"])
        if lines[n].startswith("Traceback (most recent call last)"):
            if n and lines[n - 1].startswith("Exception ignored in"):
                continue  # printed at shutdown, after the failure
            if raised := _raised(lines[n + 1 :]):
                return _shorten(raised)
    message = [line.strip() for line in lines if line.strip()]
    message = [line for line in message if not re.search(r"\b(INFO|DEBUG): ", line)]
    return _shorten(message[-1]) if message else "it printed no error"


def _raised(lines: list[str]) -> str:
    """The exception after `Traceback ...`, e.g. `KeyError: 'x'`, with all lines of its message."""
    for n, line in enumerate(lines):
        found = _RAISED.match(line)
        if not line.startswith((" ", "\t")) and found is not None:
            name = found["name"].rpartition(".")[2]
            following = []
            for more in lines[n + 1 :]:
                if not more.strip() or re.match(r"\[\S+\] \d{4}-|\S+Error\b|#|Exception ", more):
                    break
                following.append(more.strip())
            message = " ".join([found["message"] or "", *following]).strip()
            if name == "AssertionError" and not message:  # as many of ESPnet's checks
                code = [one.strip() for one in lines[:n] if one.strip().startswith("assert ")]
                message = code[-1] if code else ""
            return message if name == "UserError" else f"{name}: {message}".removesuffix(": ")
    return ""


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."
