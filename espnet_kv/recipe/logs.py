"""Reading the log of a running job: epochs, warnings, and why it failed."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

# what ESPnet's trainer says before it stops early, with status 0
ALL_INVALID = re.compile(r"The gradients at all steps are invalid in this epoch.*?(\d+)epoch")
_RESULTS = re.compile(r"\b(\d+)epoch results: (.*)")
_ERROR = re.compile(r"(?:[\w./-]+: )?error: (?P<said>.+)")
_RAISED = re.compile(r"(?P<name>[A-Za-z_][\w.]*)(?:: (?P<said>.*))?$")
_LONGEST = 400  # characters of a reason


@dataclass(frozen=True)
class Epoch:
    """What ESPnet's trainer reports of an epoch: section (train, valid) -> name -> number."""

    number: int
    results: dict[str, dict[str, str]]

    def __str__(self) -> str:
        said = []
        for section in ("train", "valid"):
            if loss := self.results.get(section, {}).get("loss"):
                said.append(f"{section} loss {loss}")
        if accuracy := self.results.get("valid", {}).get("acc"):
            said.append(f"accuracy {accuracy}")
        return ", ".join(said)

    def not_finite(self) -> str:
        """`train loss is nan`, or nothing where the losses are numbers."""
        for section in ("train", "valid"):
            loss = self.results.get(section, {}).get("loss", "0")
            if not math.isfinite(float(loss)):
                return f"{section} loss is {loss}"
        return ""


def parse_epoch(line: str) -> Epoch | None:
    """The results in a line of a training's log; None: it is another line."""
    found = _RESULTS.search(line)
    if found is None:
        return None
    sections = re.findall(r"\[(\w+)\] ([^\[]*)", found[2])
    results = {
        section: dict(re.findall(r"([^\s,=]+)=([^\s,]+)", text)) for section, text in sections
    }
    return Epoch(int(found[1]), results)


class JobLog:
    """The part of a log that one job writes, from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._read = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> list[str]:
        """Whole lines that were written since the last call."""
        lines, _, _ = self._bytes(self._read).rpartition(b"\n")
        if not lines:
            return []
        self._read += len(lines) + 1
        return lines.decode("utf-8", errors="replace").split("\n")

    def reason(self) -> str:
        """Why the job failed, in one line: the last error or exception that it printed."""
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
            return _shorten(found["said"])
        if lines[n].startswith("Traceback (most recent call last)"):
            if n and lines[n - 1].startswith("Exception ignored in"):
                continue  # printed at shutdown, after the failure
            if raised := _raised(lines[n + 1 :]):
                return _shorten(raised)
    said = [line.strip() for line in lines if line.strip()]
    said = [line for line in said if not re.search(r"\b(INFO|DEBUG): ", line)]
    return _shorten(said[-1]) if said else "it printed no error"


def _raised(lines: list[str]) -> str:
    """The exception below `Traceback ...`: `KeyError: 'x'`, and what follows of its message."""
    for n, line in enumerate(lines):
        found = _RAISED.match(line)
        if not line.startswith((" ", "\t")) and found is not None:
            name = found["name"].rpartition(".")[2]
            following = []
            for more in lines[n + 1 :]:
                if not more.strip() or re.match(r"\[\S+\] \d{4}-|\S+Error\b|#|Exception ", more):
                    break
                following.append(more.strip())
            said = " ".join([found["said"] or "", *following]).strip()
            return said if name == "UserError" else f"{name}: {said}".removesuffix(": ")
    return ""


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."
