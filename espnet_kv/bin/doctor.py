"""Whether everything needed is installed: `python -m espnet_kv doctor`.

Besides the standard library it needs nothing at its start, so that it can say what is missing.
"""

import argparse
import ast
import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from espnet_kv.espnet.register import CHOICES

PYTHON = (3, 12)
TOOLS = {
    "sox": "speed perturbation of ESPnet's asr.sh (apt-get install sox)",
    "sclite": "scoring of ESPnet's asr.sh (apt-get install sctk)",
    "flac": "flac by pipes in a wav.scp (apt-get install flac)",
    "lmplz": "--use_ngram true (build KenLM: https://github.com/kpu/kenlm)",
}
"""Optional programs -> what needs them, and where they come from."""
SCTK = Path("/usr/lib/sctk/bin")
"""Where Debian's package sctk has sclite, outside of everybody's PATH."""
OK, NOTE, ERROR = "ok", "note", "error"


def main(cmd: Sequence[str] = ()) -> int:
    """Print one line per finding.

    Args:
        cmd: the arguments; --help is the only one.

    Returns:
        1 if something required is missing, too old or broken, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m espnet_kv doctor",
        description="Print what is installed, and what is missing, too old or broken.",
        allow_abbrev=False,
    )
    _, unknown = parser.parse_known_args(cmd)
    if unknown:
        print(f"error: unrecognized arguments: {' '.join(unknown)} (see --help)", file=sys.stderr)
        return 1
    failed = False
    for kind, text in findings():
        failed |= kind == ERROR
        print(f"{kind:5}  {text}", flush=True)
    print("something required is missing or broken" if failed else "everything required is there")
    return int(failed)


def findings() -> Iterator[tuple[str, str]]:
    """Kind (OK, NOTE, ERROR) and text of everything that is looked at."""
    wanted = ".".join(map(str, PYTHON))
    is_old = sys.version_info < PYTHON
    yield ERROR if is_old else OK, f"python {platform.python_version()} (needs {wanted} or newer)"
    try:
        required, extras = requirements()
    except (OSError, SyntaxError, ValueError, LookupError) as error:
        yield ERROR, f"espnet_kv: what it requires cannot be read ({error}): install it again"
        required, extras = ["espnet", "torch"], {}
    for requirement in required:
        yield package(requirement)
    for extra, needed in extras.items():
        missing = [name for one in needed if version_of(name := name_of(one)) is None]
        if missing:
            yield (
                NOTE,
                f'extra {extra} lacks {", ".join(missing)}: pip install "espnet_kv[{extra}]"',
            )
        else:
            yield OK, f"extra {extra}"
    yield from devices()
    yield from registered()
    for tool, use in TOOLS.items():
        place = shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:{SCTK}")
        yield (NOTE, f"{tool} is not there: {use}") if place is None else (OK, f"{tool}: {place}")


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What pip installs with the package, and with each of its extras; as in requires.txt."""
    setup = Path(__file__).parents[2] / "setup.py"
    if setup.exists():  # a clone, which may be newer than what pip has noted of it
        return _of_setup(setup)
    listed = metadata.requires("espnet_kv") or []
    required, extras = [], dict[str, list[str]]()
    for line in listed:
        requirement, _, marker = line.partition(";")
        if extra := re.search(r"""extra == ['"](\w+)['"]""", marker):
            extras.setdefault(extra[1], []).append(requirement.strip())
        else:
            required.append(requirement.strip())
    return required, extras


def _of_setup(file: Path) -> tuple[list[str], dict[str, list[str]]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given: dict[str, Any] = {str(word.arg): word.value for call in calls for word in call.keywords}
    required, extras = (ast.literal_eval(given[k]) for k in ("install_requires", "extras_require"))
    return required, extras


def package(requirement: str) -> tuple[str, str]:
    """Whether a package is installed, and new enough.

    Args:
        requirement: as `espnet[asr]>=202611`.
    """
    name, (least,) = name_of(requirement), re.findall(r">=\s*([\w.]+)", requirement) or [""]
    install = f'pip install -U "{requirement}"'
    version = version_of(name)
    if version is None:
        return ERROR, f"{name} is not installed: {install}"
    if least and _numbers(version) < _numbers(least):
        return ERROR, f"{name} {version} is too old, {least} or newer is needed: {install}"
    return OK, f"{name} {version}"


def name_of(requirement: str) -> str:
    """The name of the package in a requirement."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def version_of(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return str(metadata.version(name))
    except Exception:  # of a damaged installation anything
        return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def devices() -> Iterator[tuple[str, str]]:
    """CPU cores and GPUs."""
    yield OK, f"{len(os.sched_getaffinity(0))} CPU cores"
    try:
        torch = importlib.import_module("torch")
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    except Exception as error:
        yield ERROR, _broken("torch", error)
    else:
        yield (OK, f"GPUs: {', '.join(names)}") if names else (NOTE, "no GPU: the CPU is used")


def registered() -> Iterator[tuple[str, str]]:
    """Whether ESPnet knows our classes."""
    try:
        tables: dict[str, Any] = {}
        for task in ("asr", "lm"):
            tables |= vars(importlib.import_module(f"espnet2.tasks.{task}"))
        for table, choices in CHOICES.items():
            missing = [name for name in choices if name not in tables[table].classes]
            title = table.replace("lm_", "language model_").replace("_choices", "s of ESPnet")
            if missing:
                yield ERROR, f"{title} lack {', '.join(missing)}: another espnet_kv is in the way?"
            else:
                yield OK, f"{title}: {', '.join(choices)}"
    except Exception as error:
        yield ERROR, _broken("espnet", error)


def _broken(name: str, error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    return f"{name} cannot be imported ({type(error).__name__}: {said}): install it again"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
