"""The recipe's driver: `python -m espnet_kv.recipe --stage 1 --stop_stage 13 ...`."""

import sys
import time
from collections.abc import Callable, Sequence

from espnet_kv.errors import command
from espnet_kv.recipe import (
    convert_stage,
    data_stages,
    lm_stages,
    model_stages,
    profile_stage,
    report_stage,
    score_stage,
)
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import STAGES, parse

RUN: dict[int, Callable[[Layout], None]] = {
    1: data_stages.prepare_data,
    2: data_stages.perturb,
    3: data_stages.format_sets,
    4: data_stages.drop_lengths,
    5: data_stages.list_tokens,
    6: lm_stages.collect_lm_stats,
    7: lm_stages.train_lm,
    8: lm_stages.lm_perplexity,
    9: lm_stages.train_ngram,
    10: model_stages.collect_stats,
    11: model_stages.train_models,
    12: model_stages.decode,
    13: score_stage.score_models,
    14: profile_stage.profile_models,
    15: report_stage.compare_models,
}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages asked for.

    Args:
        arguments: options (`run.sh --help`); sys.argv when None.

    Raises:
        UserError: bad options or bad input, in one line.
    """
    args = parse(arguments)
    layout = Layout(args)
    run = RUN if args.convert_from is None else RUN | convert_stage.STAGES
    start = time.monotonic()
    for stage in range(args.stage, args.stop_stage + 1):
        print(f"{time.strftime('%H:%M:%S')} stage {stage}: {STAGES[stage]}", flush=True)
        run[stage](layout)
    print(f"{time.strftime('%H:%M:%S')} done in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
