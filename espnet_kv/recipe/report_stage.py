"""Stage 15: compare every profiled model below the experiments."""

from espnet_kv.errors import UserError
from espnet_kv.recipe.layout import Layout
from espnet_kv.report.profiles import read_profiles
from espnet_kv.report.write import TITLE, write_report


def compare_models(layout: Layout) -> None:
    """Write EXPDIR/report and the table in RESULTS.md; print table and page."""
    args = layout.args
    paths = sorted(args.expdir.glob("*/profile/profile.json"))
    if not paths:
        raise UserError(f"{args.expdir} holds no */profile/profile.json: profile first (stage 14)")
    page = write_report(
        read_profiles(paths), args.expdir / "report", args.results, TITLE, args.command
    )
    print(f"  page: {page.resolve()}")
    print(f"  scalars: tensorboard --logdir {args.expdir.resolve()}")
