"""The one answer to "is this done?": a step declares what it depends on and is stamped with it.

A step's digest covers the options it names, the content of the files it names, the version of its
code, and the digests of the steps before it. The stamp, written after the work has ended well,
holds that digest and the sizes of the step's products. Nothing else decides whether a step runs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espnet_kv.files import write_text
from espnet_kv.recipe.content import Content
from espnet_kv.recipe.jobs import Job

STAMP = ".done.json"


def nothing() -> Iterable[Any]:
    """No jobs, no products, nothing to check."""
    return ()


@dataclass(frozen=True, eq=False)
class Step:
    """One unit of work of a stage; equal only to itself.

    stage: number of the stage it belongs to.
    name: what messages call it, unique in a recipe, e.g. "format test_clean".
    output: directory that it makes.
    build: does the work, after the jobs have ended.
    options: name of an option of the recipe -> what it means for this step (JSON types).
    reads: role -> file whose content the result depends on; a file may be missing.
    audio: data directories whose audio the result depends on.
    after: steps whose results this one reads.
    ready: raises UserError where the work cannot begin; called before anything is written.
    version: raised by a developer when the same inputs give another result.
    jobs: the commands to run first, made when the step begins.
    products: the files without which the step does not count as done, known when it has ended.
    sign: file that tells that the output is there; None: any file in it does.
    stamp: file that holds the stamp; None: STAMP in `output`.
    in_place: the work goes on in `output` where it was cut off; others make it anew, whole.
    precious: the output is kept where it was made from something else, and the run refused.
    remedy: for a precious step, the way out that is told beside "remove it".
    given: later steps take an output that this recipe did not make; they know it by what they
        read of it. Where `keep_given`, this step does too.
    editable: the products may be edited by hand afterwards: their sizes are not compared.
    always: cheap, and done at every run.
    skipped: why there is nothing to do, e.g. "--use_lm false"; empty: there is.
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
        """Says what work that has not ended began from; outlives an output that is made anew."""
        name = self.stamp_file.name.replace("done", "begun")
        return self.output / name if self.in_place else self._beside(name)

    def _beside(self, name: str) -> Path:
        return self.output.with_name(f".{self.output.name}{name}")

    @property
    def is_given(self) -> bool:
        """Whether the output lies there, but was not made by this recipe."""
        if not self.given or self.stamp_file.exists() or self.begun_file.exists():
            return False
        return self.sign.exists() if self.sign else self.holds_something

    @property
    def holds_something(self) -> bool:
        """Whether there is anything in the output directory."""
        return self.output.is_dir() and any(self.output.iterdir())


@dataclass(frozen=True)
class State:
    """What a step's outputs are worth now.

    kind: "done", "todo", "refused" (a precious output was made from something else), "given"
        (made elsewhere) or "skipped".
    reason: why, as a message says it.
    """

    kind: str
    reason: str = ""


class Steps:
    """Judges steps by their stamps, and stamps them.

    Args:
        content: knows the content of files.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self._facts: dict[Step, dict[str, Any]] = {}
        self._begun: dict[Step, dict[str, Any]] = {}

    def facts(self, step: Step) -> dict[str, Any]:
        """What the result of `step` depends on, in JSON types; its hash is the step's digest."""
        if step not in self._facts:
            self._facts[step] = {
                "version": step.version,
                # what is not asked for is left out, so that a new option changes no old digest
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
        """Whether `step` has to run, and why."""
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
        """What changed since `step` ran or began, traced to its root."""
        stamp = read_stamp(step.stamp_file) or read_stamp(step.begun_file)
        if stamp is None:
            return "not made yet"
        then, now = stamp["facts"], self.facts(step)
        said = [] if then["version"] == now["version"] else [f"{step.name} is done in another way"]
        said += _changes(then["options"], now["options"])
        for role in then["reads"].keys() | now["reads"].keys():
            if then["reads"].get(role) != now["reads"].get(role):
                said.append(f"{step.reads.get(role, role)} changed")
        said += [
            f"audio of {name} changed"
            for name in now["audio"]
            if then["audio"].get(name) != now["audio"][name]
        ]
        if not said:
            for before in step.after:
                if then["after"].get(before.name) != now["after"][before.name]:
                    cause = self.why(before)
                    said.append(cause if cause != "not made yet" else f"{before.name} changed")
        return "; ".join(dict.fromkeys(said)) or "its inputs were made anew"

    def begin(self, step: Step) -> None:
        """Take the stamp away and note what the work begins from."""
        record = {"step": step.name, "digest": self.digest(step), "facts": self.facts(step)}
        self._begun[step] = record
        # in this order: an output with neither would count as made by others
        write_text(step.begun_file, _json(record | {"products": {}}))
        step.stamp_file.unlink(missing_ok=True)

    def end(self, step: Step) -> None:
        """Stamp `step` as done.

        Raises:
            RuntimeError: a product is missing, which is a mistake in the step's code.
        """
        self._facts.clear()  # what the step wrote is read by others
        sizes = {}
        for path in step.products():
            if not path.exists():
                raise RuntimeError(f"step {step.name!r} ended without {path}")
            sizes[str(path.relative_to(step.output))] = path.stat().st_size
        # of what it began from: inputs may have changed meanwhile
        write_text(step.stamp_file, _json(self._begun.pop(step) | {"products": sizes}))
        step.begun_file.unlink(missing_ok=True)


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def read_stamp(file: Path) -> dict[str, Any] | None:
    """A stamp; None where there is none, or none that this version can read."""
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
