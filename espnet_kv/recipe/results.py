"""RESULTS.md: all scores in exp/, as tables in the format of ESPnet's recipes."""

import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from importlib import metadata
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.files import placed, read_text, write_text
from espnet_kv.scores import KINDS, MISSING, Scores, decoding_of, interval_text, scored_sets

BEGIN, END = "<!-- generated -->", "<!-- /generated -->"
COLUMNS = ("Snt", "Wrd", "Corr", "Sub", "Del", "Ins", "Err", "S.Err", "Err, 95 %")


def write_results(
    expdir: Path, out: Path, header: Iterable[str] = (), more: Iterable[Path] = ()
) -> None:
    """Collect the scores of all `expdir/asr_*` and of `more` into the Markdown file `out`.

    The text of `out` outside the markers BEGIN and END is kept. The command, config, commit and
    overlay in the run.json of an experiment are stated above its tables.

    Args:
        header: lines below the list of versions.
        more: experiments with other names.

    Raises:
        UserError: there are no scores, or `out`, a result or a run.json is damaged.
    """
    there = [*expdir.glob("asr_*"), *more]
    experiments = sorted({exp.resolve(): exp for exp in there}.values())
    if not any(True for exp in experiments for _ in scored_sets(exp)):
        raise UserError(f"{expdir} holds no scores: decode and score first (stages 12 and 13)")
    write_page(out, header, experiments)


def write_page(out: Path, header: Iterable[str], experiments: Iterable[Path]) -> None:
    """Write versions, `header` and the scores of `experiments` into `out`; see `write_results`."""
    sections = [_experiment(exp, f"{exp.parent.name}/{exp.name}") for exp in experiments]
    parts = ["# RESULTS", _environments(out.parent), "\n".join(header), *sections]
    generated = "\n\n".join(part for part in parts if part)
    before = read_text(out) if out.exists() else ""
    write_text(out, placed(before, BEGIN, END, generated, out))


def _environments(checkout: Path) -> str:
    lines = [
        "## Environments",
        f"- date: `{datetime.now().astimezone():%a %b %d %H:%M:%S %Z %Y}`",
        f"- python version: `{' '.join(sys.version.split())}`",
    ]
    for package, name in (("espnet", "espnet"), ("torch", "pytorch")):
        try:
            lines.append(f"- {name} version: `{name} {metadata.version(package)}`")
        except metadata.PackageNotFoundError:
            continue
    if commit := _git(checkout, "rev-parse", "HEAD"):
        lines.append(f"- Git hash: `{commit}`")
        lines.append(f"  - Commit date: `{_git(checkout, 'log', '-1', '--format=%cd')}`")
    return "\n".join(lines)


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _experiment(exp: Path, title: str) -> str:
    """The section of one experiment; empty if it has no scores."""
    tables = []
    scored = list(scored_sets(exp))
    for kind in KINDS:
        results = [
            _figures(place, scores, kind) for place, scores in scored if kind in scores.rates
        ]
        if not results:
            continue
        rows = [("dataset", *COLUMNS), ("---",) * (1 + len(COLUMNS)), *results]
        table = "\n".join(f"|{'|'.join(row)}|" for row in rows)
        tables.append(f"### {kind.upper()}\n\n{table}")
    if not tables:
        return ""
    return "\n\n".join(part for part in (f"## {title}", _provenance(exp), *tables) if part)


def _figures(place: Path, scores: Scores, kind: str) -> tuple[str, ...]:
    """The row of one test set."""
    rates = scores.rates[kind]
    percents = (f"{rate:.1f}" for rate in rates.percents)
    decoding = decoding_of(place)
    name = f"{decoding.name}/{place.relative_to(decoding)}"
    interval = interval_text(rates.interval) or MISSING
    return name, str(rates.utterances), str(rates.words), *percents, interval


def _provenance(exp: Path) -> str:
    file = exp / "run.json"
    if not file.exists():
        return ""
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        stated = {
            key: run[key] for key in ("command", "config", "commit", "overlay") if run.get(key)
        }
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): train again (stage 11)") from error
    return "\n".join(f"- {key}: `{value}`" for key, value in stated.items())
