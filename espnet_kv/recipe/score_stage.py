"""Stage 13: score every decoded test set and write RESULTS.md."""

from espnet_kv.errors import UserError
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.results import write_results
from espnet_kv.recipe.score import KINDS, score, write_score
from espnet_kv.recipe.tokens import piece_tokenizer


def score_models(layout: Layout) -> None:
    """Write score_wer, score_cer (and score_ter) per test set, then the tables; print the WERs."""
    args = layout.args
    kinds = KINDS if layout.bpe_model is not None else KINDS[:2]
    pieces = piece_tokenizer(layout.bpe_model) if layout.bpe_model is not None else None
    rates: dict[str, dict[str, float]] = {}
    for config_file in args.asr_config:
        exp = layout.asr_exp(config_file)
        for name in args.test_sets:
            decoded = exp / layout.inference_name / name
            if not (decoded / "text").exists():
                raise UserError(f"{decoded}/text does not exist: decode first (stage 12)")
            ref = DataDir.read(layout.dump(name)).text
            hyp = _read_text(decoded / "text")
            for kind in kinds:
                result = score(ref, hyp, kind, pieces if kind == "ter" else None)
                write_score(result, decoded / f"score_{kind}")
                if kind == "wer":
                    rates.setdefault(exp.name, {})[name] = result.error_rate
    write_results(args.expdir, args.results)
    _print_table(rates, args.test_sets)
    print(f"  tables: {args.results.resolve()}")
    print(f"  models, logs, decodings: {args.expdir.resolve()}")
    print(f"  training curves: tensorboard --logdir {args.expdir.resolve()}")


def _read_text(path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    return {pair[0]: pair[1] if len(pair) > 1 else "" for pair in pairs}


def _print_table(rates: dict[str, dict[str, float]], test_sets: list[str]) -> None:
    width = max(map(len, rates))
    print(f"  {'WER (%)':{width}}  " + "  ".join(f"{name:>10}" for name in test_sets))
    for exp, row in rates.items():
        print(f"  {exp:{width}}  " + "  ".join(f"{row[name]:10.1f}" for name in test_sets))
