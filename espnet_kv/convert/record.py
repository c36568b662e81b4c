"""The report of a conversion: conversion.json, and a page and a figure made from it.

The module does not import torch, because the recipe uses it to add word error rates.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError, one_line
from espnet_kv.files import new_file, write_text
from espnet_kv.scores import Rates, decoding_of, rate_text, scored_sets

SCHEMA = "espnet_kv.conversion/2"
FILE, PAGE, FIGURE = "conversion.json", "conversion.md", "conversion.png"
# keys of "wer" and their titles on the page
STAGES = {
    "before": "before",
    "after": "converted",
    "fine_tuned": "converted, fine-tuned",
    "control": "not converted, same fine-tuning",
}
ERRORS = ("k", "v", "output")


def read_record(experiment: Path) -> dict[str, Any]:
    """Read the conversion.json of an experiment.

    Raises:
        UserError: the file does not exist or is damaged.
    """
    file = experiment / FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: {experiment} is not a converted model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}): convert again") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{file} is not a conversion record of this version: convert again")
    return record


def read_wer(experiment: Path) -> dict[str, dict[str, Rates]]:
    """Decoding -> test set -> rates of words, as scored by stage 13; empty if none was scored."""
    rates: dict[str, dict[str, Rates]] = {}
    for place, scores in scored_sets(experiment):
        if "wer" in scores.rates:
            rates.setdefault(decoding_of(place).name, {})[place.name] = scores.rates["wer"]
    return rates


def update_report(experiment: Path, related: Mapping[str, Path]) -> None:
    """Write the word error rates of related experiments to the record and page of `experiment`.

    Args:
        experiment: directory of a converted model.
        related: key of STAGES -> experiment directory.

    Raises:
        UserError: `experiment` is not a converted model, or its record or a score file is damaged.
    """
    record = read_record(experiment)
    found = {stage: rates for stage, place in related.items() if (rates := read_wer(place))}
    for key, name in (("wer", "err"), ("wer_interval", "interval")):
        record[key] = {
            stage: {
                decoding: {test: getattr(rates, name) for test, rates in sets.items()}
                for decoding, sets in decodings.items()
            }
            for stage, decodings in found.items()
        }
    try:
        write_pages(experiment, record, experiment.name)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{experiment / FILE} is damaged ({error!r}): convert again") from error
    write_text(experiment / FILE, json.dumps(record, indent=1) + "\n")


def write_pages(directory: Path, record: Mapping[str, Any], name: str) -> None:
    """Write conversion.md and conversion.png of a record.

    name: title of the page.
    """
    draw(record, directory / FIGURE)
    write_text(directory / PAGE, page(record, name))


def page(record: Mapping[str, Any], name: str) -> str:
    """The Markdown of a record."""
    source, options, calibration = record["source"], record["options"], record["calibration"]
    lines = [
        f"# {name}",
        "",
        f"- converted from `{source['model_file']}` (sha256 `{source['model_sha256'][:16]}`)",
        f"- command: `{record['command']}`",
        f"- commit: `{record['commit']}`, {record['date']}",
        f"- attention_type: `{options['attention_type']}`, parts: {', '.join(options['parts'])}",
    ]
    if calibration is None:
        lines.append("- fitted to the weights alone (Frobenius norm): no calibration audio")
    else:
        seconds = calibration["seconds"]
        lines.append(
            f"- fitted to {seconds['fit']:g} s of `{calibration['scp']}` (seed "
            f"{calibration['seed']}), errors measured on {seconds['held_out']:g} s of other audio"
        )
    if tuned := record.get("finetune"):
        length = tuned["iterations_per_epoch"] or "all"
        lines.append(
            f"- then fine-tuned: {tuned['epochs']} epochs of {length} batches, learning rate "
            f"{tuned['lr']:g}"
        )
    lines += ["", "## Attention cache of one utterance, bytes in use (allocated)", ""]
    lines += _table(
        ("part", "utterance", "before", "after", "removed", "measured in"),
        [
            (part, _length(cache["before"]), *_bytes(cache), cache["after"]["how"])
            for part, cache in record["cache"].items()
        ],
    )
    lines += ["", "## Layers", ""]
    layers = record["layers"]
    rows = []
    for layer in layers:
        errors = layer["errors"] or {}
        conf = ", ".join(f"{key} {value}" for key, value in layer["conf"].items())
        figures = [f"{errors[key]:.4f}" if key in errors else "" for key in ERRORS]
        rows.append((layer["name"], conf, *figures))
    head = ("layer", "option", "error of K", "of V", "of the output")
    lines += _table(head, rows)
    lines += [
        "",
        "Errors were not measured, because there was no calibration audio."
        if calibration is None
        else "Error: root of the squared error divided by the variance. K and V are predicted from "
        "the cached vectors by the best affine map.",
    ]
    lines += _choice_lines(record.get("choices") or {})
    lines += _wer_lines(record.get("wer") or {}, record.get("wer_interval") or {})
    lines += ["", f"![errors, spectra, cache]({FIGURE})", ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _choice_lines(choices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not choices:
        return []
    rows: list[tuple[str, ...]] = [
        (part, name, f"{error:.4f}", "yes" if name == choice["chosen"] else "")
        for part, choice in choices.items()
        for name, error in choice["errors"].items()
    ]
    return [
        "",
        "## Candidates, error of the model on held-out audio",
        "",
        *_table(("part", "candidate", "error", "chosen"), rows),
        "",
        "Encoder: squared error of the output divided by its variance. Decoder: divergence of its "
        "distributions, in nats per token.",
    ]


def _length(cache: Mapping[str, Any]) -> str:
    return f"{cache['frames']} frames" if "frames" in cache else f"{cache['tokens']} tokens"


def _bytes(cache: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = cache["before"]["bytes"], cache["after"]["bytes"]
    cells = (f"{one['bytes']} ({one['allocated']})" for one in (cache["before"], cache["after"]))
    return *cells, f"{100 * (1 - after / before):.2f} %"


def _wer_lines(
    wer: Mapping[str, Mapping[str, Mapping[str, float]]],
    intervals: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
) -> list[str]:
    def cell(stage: str, decoding: str, test: str) -> str:
        if (rate := wer[stage][decoding].get(test)) is None:
            return ""
        return rate_text(rate, intervals.get(stage, {}).get(decoding, {}).get(test))

    lines = []
    for decoding in sorted({name for rates in wer.values() for name in rates}):
        sets = sorted({test for rates in wer.values() for test in rates.get(decoding, {})})
        rows = [
            (title, *(cell(stage, decoding, test) for test in sets))
            for stage, title in STAGES.items()
            if wer.get(stage, {}).get(decoding)
        ]
        title = f"## WER (%) with 95 % interval, {decoding}"
        lines += ["", title, "", *_table(("model", *sets), rows)]
    return lines


def draw(record: Mapping[str, Any], file: Path) -> None:
    """Draw errors, spectra and cache of a record as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = record["layers"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    errors, spectra, cache = figure.subplots(1, 3)
    numbers = range(len(layers))
    for key in ERRORS:
        values = [(layer["errors"] or {}).get(key) for layer in layers]
        if None not in values:
            errors.plot(numbers, values, marker="o", label=key)
    if errors.lines:
        errors.legend()
    errors.set(title="relative error, held-out audio", xlabel="layer", ylim=(0, None))
    errors.set_xticks(list(numbers))

    colors = {part: f"C{n}" for n, part in enumerate(record["cache"])}
    labelled = set()
    for layer in layers:
        values, part = layer["spectrum"], layer["part"]
        label = None if part in labelled else part
        labelled.add(part)
        spectra.semilogy(range(1, 1 + len(values)), values, color=colors[part], lw=1, label=label)
        rank = layer["conf"].get("kv_rank")
        if rank is not None and rank <= len(values):
            spectra.plot([rank], [values[rank - 1]], "|", color=colors[part], ms=12)
    spectra.set(title="singular values of [W_k; W_v]", xlabel="number (|: kv_rank)")
    spectra.set_ylim(bottom=1e-5)
    spectra.legend()

    parts = list(record["cache"])
    for shift, stage in ((-0.2, "before"), (0.2, "after")):
        heights = [record["cache"][part][stage]["bytes"] / 1000 for part in parts]
        bars = cache.bar([n + shift for n in range(len(parts))], heights, 0.4, label=stage)
        cache.bar_label(bars, fmt="%.3g", fontsize=8)
    cache.set_xticks(
        range(len(parts)), [f"{p}\n{_length(record['cache'][p]['before'])}" for p in parts]
    )
    cache.set(title="attention cache of one utterance, kB held")
    cache.legend()
    with new_file(file) as partial:
        figure.savefig(partial, dpi=110)
