"""Steps of the recipe, and stamps that decide whether a step must run.

A step's digest covers its options, the content of the files it reads, its version, and the digests
of the steps it depends on. The stamp, written after the work has succeeded, holds the digest and
the sizes of the step's products. Only stamps decide whether a step runs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espnet_kv.files import PARTIAL, write_text
from espnet_kv.recipe.content import Content
from espnet_kv.recipe.jobs import Job

STAMP = ".done.json"


def nothing() -> Iterable[Any]:
    """No jobs, no products, nothing to check."""
    return ()


@dataclass(frozen=True, eq=False)
class Step:
    """One unit of work of a stage; compared by identity.

    stage: number of its stage.
    name: unique name for messages, e.g. "format test_clean".
    output: output directory.
    build: does the work, after the jobs have ended.
    options: name of an option of the recipe -> its value for this step (JSON types).
    reads: role -> file whose content affects the result; a file may be missing.
    audio: data directories whose audio affects the result.
    after: steps that this step depends on.
    ready: raises UserError if the work cannot begin; called before anything is written.
    version: increased by a developer when the same inputs give another result.
    jobs: returns the commands to run first; called when the step begins.
    products: returns the required output files; called when the step has ended.
    sign: file that exists if the output exists; None: any file in `output`.
    stamp: file of the stamp; None: STAMP in `output`.
    in_place: interrupted work is continued in `output`; otherwise the output is replaced.
    precious: an output from other inputs is kept, and the run is refused.
    remedy: for a precious step, an alternative to "remove it" in the message.
    given: an output that this recipe did not make is accepted by later steps, whose digests
        cover the files they read; with `keep_given` also by this step.
    keep_given: see `given`.
    editable: products may be edited by hand, so their sizes are not compared.
    always: the step is cheap and runs every time.
    skipped: reason to skip the step, e.g. "--use_lm false"; empty: the step is not skipped.
    """

    stage: int
    name: str
    output: Path
    build: Callable[[], object]
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: Mapping[str, Path] = field(default_factory=dict)
    audio: Sequence[Path] = ()
    after: Sequence["Step"] = ()
    ready: Callable[[], object] = nothing
    version: int = 1
    jobs: Callable[[], Iterable[Job]] = nothing
    products: Callable[[], Iterable[Path]] = nothing
    sign: Path | None = None
    stamp: Path | None = None
    in_place: bool = False
    precious: bool = False
    remedy: str = ""
    given: bool = True
    keep_given: bool = False
    editable: bool = False
    always: bool = False
    skipped: str = ""

    @property
    def stamp_file(self) -> Path:
        return self.stamp or self.output / STAMP

    @property
    def begun_file(self) -> Path:
        """File with the inputs of unfinished work; kept when the output is replaced."""
        name = self.stamp_file.name.replace("done", "begun")
        return self.output / name if self.in_place else self._beside(name)

    def _beside(self, name: str) -> Path:
        return self.output.with_name(f".{self.output.name}{name}")

    @property
    def is_given(self) -> bool:
        """Whether the output exists, but was not made by this recipe."""
        if not self.given or self.stamp_file.exists() or self.begun_file.exists():
            return False
        return self.sign.exists() if self.sign else self.holds_something

    @property
    def holds_something(self) -> bool:
        """Whether the output directory holds more than what a killed run left half-written."""
        return self.output.is_dir() and any(
            not entry.name.startswith(PARTIAL) for entry in self.output.iterdir()
        )


@dataclass(frozen=True)
class State:
    """The state of a step's output.

    kind: "done", "todo", "refused" (a precious output was made from other inputs), "given" (not
        made by this recipe) or "skipped".
    reason: the reason, for messages.
    """

    kind: str
    reason: str = ""


class Steps:
    """Determines the state of steps from their stamps, and writes stamps.

    Args:
        content: hashes of files.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self._facts: dict[Step, dict[str, Any]] = {}
        self._begun: dict[Step, dict[str, Any]] = {}

    def facts(self, step: Step) -> dict[str, Any]:
        """All inputs of `step` in JSON types; their hash is the step's digest."""
        if step not in self._facts:
            self._facts[step] = {
                "version": step.version,
                # unset options are left out, so that a new option does not change old digests
                "options": {
                    name: json.loads(json.dumps(value, default=str))
                    for name, value in step.options.items()
                    if value is not None and value is not False and value not in ("", [], {})
                },
                "reads": {role: self._content.of_file(file) for role, file in step.reads.items()},
                "audio": {path.name: self._content.of_audio(path) for path in step.audio},
                "after": {u.name: "" if u.is_given else self.digest(u) for u in step.after},
            }
        return self._facts[step]

    def digest(self, step: Step) -> str:
        """Hash of `facts`."""
        text = json.dumps(self.facts(step), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state(self, step: Step) -> State:
        """Whether `step` must run, and the reason."""
        if step.skipped:
            return State("skipped", step.skipped)
        if step.always:
            return State("todo", "always done")
        stamp = read_stamp(step.stamp_file)
        if stamp is None:
            return self._unstamped(step)
        if stamp["digest"] != self.digest(step):
            return State("refused" if step.precious else "todo", self.why(step))
        for product, size in stamp["products"].items():
            path = step.output / product
            if not path.exists():
                return State("todo", f"{path} is gone")
            if not step.editable and path.stat().st_size != size:
                return State("todo", f"{path} changed after it was made")
        return State("done")

    def _unstamped(self, step: Step) -> State:
        if step.is_given:
            return State("given", "it was not made by this recipe")
        begun = read_stamp(step.begun_file)
        if begun is None:
            for file in (step.stamp_file, step.begun_file):
                if file.exists():
                    return State("refused" if step.precious else "todo", f"{file} cannot be read")
            return State("todo", "not made yet")
        if step.precious and step.holds_something and begun["digest"] != self.digest(step):
            return State("refused", self.why(step))
        return State("todo", "was cut off")

    def why(self, step: Step) -> str:
        """The inputs that changed since `step` ran or began, traced through earlier steps."""
        stamp = read_stamp(step.stamp_file) or read_stamp(step.begun_file)
        if stamp is None:
            return "not made yet"
        then, now = stamp["facts"], self.facts(step)
        changes = [] if then["version"] == now["version"] else [f"{step.name} has a new version"]
        changes += _changes(then["options"], now["options"])
        for role in then["reads"].keys() | now["reads"].keys():
            if then["reads"].get(role) != now["reads"].get(role):
                changes.append(f"{step.reads.get(role, role)} changed")
        changes += [
            f"audio of {name} changed"
            for name in now["audio"]
            if then["audio"].get(name) != now["audio"][name]
        ]
        if not changes:
            for before in step.after:
                if then["after"].get(before.name) != now["after"][before.name]:
                    cause = self.why(before)
                    changes.append(cause if cause != "not made yet" else f"{before.name} changed")
        return "; ".join(dict.fromkeys(changes)) or "its inputs were made again"

    def begin(self, step: Step) -> None:
        """Remove the stamp and record the inputs of the work."""
        record = {"step": step.name, "digest": self.digest(step), "facts": self.facts(step)}
        self._begun[step] = record
        # in this order: an output with neither file would count as given
        write_text(step.begun_file, _json(record | {"products": {}}))
        step.stamp_file.unlink(missing_ok=True)

    def end(self, step: Step) -> None:
        """Stamp `step` as done.

        Raises:
            RuntimeError: a product is missing, which is a bug in the step.
        """
        self._facts.clear()  # other steps read the files written by this step
        sizes = {}
        for path in step.products():
            if not path.exists():
                raise RuntimeError(f"step {step.name!r} ended without {path}")
            sizes[str(path.relative_to(step.output))] = path.stat().st_size
        # with the recorded inputs, because the current ones may have changed
        write_text(step.stamp_file, _json(self._begun.pop(step) | {"products": sizes}))
        step.begun_file.unlink(missing_ok=True)


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def read_stamp(file: Path) -> dict[str, Any] | None:
    """Read a stamp; None: it is missing or not readable by this version."""
    try:
        stamp = json.loads(file.read_text(encoding="utf-8"))
        stamp["digest"], stamp["products"], stamp["facts"]["after"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stamp


def _changes(then: Any, now: Any, name: str = "") -> list[str]:
    """Differences of two JSON values, each as `--NAME was A, is B`."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*now, *then]))
        lists = (
            _changes(then.get(key), now.get(key), f"{name}.{key}" if name else _called(key))
            for key in keys
        )
        return [change for changes in lists for change in changes]
    if then == now:
        return []
    return [f"{name} was {_short(then)}, is {_short(now)}"]


def _called(key: str) -> str:
    return f"--{key}" if key.isidentifier() else key


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
