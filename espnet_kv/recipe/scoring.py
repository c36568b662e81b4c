"""Stage 13: score every decoded test set and write RESULTS.md."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError
from espnet_kv.files import read_text, write_text
from espnet_kv.recipe import whisper_models
from espnet_kv.recipe.counts import count_sets, markdown
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.results import write_results
from espnet_kv.recipe.score import score, write_score
from espnet_kv.recipe.steps import Step
from espnet_kv.recipe.tokens import piece_tokenizer
from espnet_kv.scores import (
    FILE,
    KINDS,
    RECORD,
    Rates,
    decoded_how,
    decoding_of,
    rate_text,
    read_scored_set,
)

STAMP = ".scored.done.json"


def score_step(layout: Layout, config_file: Path, name: str, decoded: Step) -> Step:
    """Write scores.json, score_wer, score_cer and, with BPE, score_ter of a decoded test set."""
    exp = layout.asr_exp(config_file)
    out, dump = layout.decoded(config_file, name), layout.formatted(name)
    kinds = KINDS if layout.bpe_model is not None else KINDS[:2]

    def build() -> None:
        pieces = piece_tokenizer(layout.bpe_model) if layout.bpe_model is not None else None
        clean = whisper_models.text_cleaner(layout)
        ref = {utt: clean(text) for utt, text in DataDir.read(dump).text.items()}
        hyp = {utt: clean(text) for utt, text in read_hypotheses(out / "text").items()}
        if missing := sorted(ref.keys() - hyp.keys()):
            raise UserError(
                f"{out / 'text'} lacks {len(missing)} of {len(ref)} utterances (the first: "
                f"{missing[0]}): decode again (stage 12)"
            )
        scores: dict[str, Any] = dataclasses.asdict(decoded_how(out))
        for kind in kinds:
            result = score(ref, hyp, kind, pieces if kind == "ter" else None)
            write_score(result, out / f"score_{kind}")
            scores[kind] = result.counts | {"interval": result.interval}
        write_text(out / FILE, json.dumps(scores, indent=1) + "\n")

    return Step(
        stage=13,
        name=f"score {name} of {exp.name}",
        output=out,
        build=build,
        options={"cleaner": layout.token_options["cleaner"]},
        reads={"hypotheses": out / "text", "references": dump / "text", "record": out / RECORD},
        after=[decoded],
        version=3,
        products=lambda: [out / FILE, *(out / f"score_{kind}" / "result.txt" for kind in kinds)],
        stamp=out / STAMP,
        given=False,
    )


def results_step(layout: Layout, scored: Mapping[tuple[Path, str], Step]) -> Step:
    """Write RESULTS.md from all scores, and print the word error rates of this run.

    Args:
        scored: (experiment, test set) -> scoring step.
    """
    args = layout.args
    return Step(
        stage=13,
        name=args.results.name,
        output=args.expdir,
        build=lambda: publish(layout, [step.output for step in scored.values()]),
        after=list(scored.values()),
        stamp=args.expdir / ".results.done.json",
        always=True,
    )


def publish(layout: Layout, scored: Iterable[Path]) -> None:
    """Write RESULTS.md of all that is scored below --expdir, and print the WERs of this run.

    Args:
        scored: directories of this run's test sets.
    """
    args = layout.args
    experiments = [layout.asr_exp(config) for config in args.asr_config]
    write_results(args.expdir, args.results, markdown(count_sets(layout)), experiments)
    rates = {}
    for place in scored:
        exp = decoding_of(place).parent
        rates[exp.name, place.name] = read_scored_set(place).rates["wer"]
    _print_table(rates, args.test_sets)
    print(f"  tables: {args.results.resolve()}")
    print(f"  models, logs, decodings: {args.expdir.resolve()}")
    print(f"  training curves: tensorboard --logdir {args.expdir.resolve()}")


def read_hypotheses(path: Path) -> dict[str, str]:
    """Utterance -> recognised words."""
    lines = read_text(path).splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    return {pair[0]: pair[1] if len(pair) > 1 else "" for pair in pairs}


def _print_table(rates: Mapping[tuple[str, str], Rates], test_sets: Sequence[str]) -> None:
    shown = {key: rate_text(found.err, found.interval) for key, found in rates.items()}
    names = list(dict.fromkeys(exp for exp, _ in rates))
    width = max(map(len, names))
    print(f"  {'WER (%), 95 % interval':{width}}  " + "  ".join(f"{s:>20}" for s in test_sets))
    for exp in names:
        row = "  ".join(f"{shown[exp, name]:>{max(20, len(name))}}" for name in test_sets)
        print(f"  {exp:{width}}  {row}")
