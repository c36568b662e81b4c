"""The recipe's driver: `python -m espnet_kv.recipe --stage 1 --stop_stage 13 ...`."""

import sys
import time
from collections.abc import Sequence

from espnet_kv.cli import command
from espnet_kv.recipe import cluster
from espnet_kv.recipe.content import Content
from espnet_kv.recipe.counts import count_sets, table
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import STAGES, parse
from espnet_kv.recipe.plan import plan
from espnet_kv.recipe.pool import terminate_on_signals
from espnet_kv.recipe.runner import forecast, run_steps
from espnet_kv.recipe.steps import Steps

MEMORY = ".content.json"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages given by the options.

    Args:
        arguments: options (`run.sh --help`); None: sys.argv.

    Raises:
        UserError: bad options or bad input.
    """
    args = parse(arguments)
    workers = cluster.read(vars(args))
    layout = Layout(args)
    steps = plan(layout)
    judge = Steps(Content(args.dumpdir / MEMORY, args.nj, keep=not args.dry_run))
    stages = range(args.stage, args.stop_stage + 1)
    if args.dry_run:
        for step, outcome in forecast(steps, judge, stages):
            print(f"stage {step.stage}: {step.name}: {outcome}")
        return
    parallel = {11: args.train_nj, 12: args.inference_nj, 14: 1}
    start = time.monotonic()
    with terminate_on_signals(), cluster.opened(workers):
        for stage in stages:
            print(f"{time.strftime('%H:%M:%S')} stage {stage}: {STAGES[stage]}", flush=True)
            of_stage = [step for step in steps if step.stage == stage]
            with cluster.used_in(stage, workers):
                run_steps(of_stage, judge, parallel.get(stage, args.nj), args.command)
    print(table(count_sets(layout)))
    print(f"{time.strftime('%H:%M:%S')} done in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
