"""What a run of the recipe would do, judged from stamps of work that was never done."""

from pathlib import Path

import pytest

from espnet_kv.recipe.content import Content
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import LAST_STAGE, parse
from espnet_kv.recipe.plan import plan
from espnet_kv.recipe.runner import forecast
from espnet_kv.recipe.steps import Steps

RECIPE = Path(__file__).parents[2] / "egs2/librispeech_100_kv/asr1"
SETS = ("train_clean_100", "dev", "test_clean", "test_other", "other_set")


def recipe_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a directory like the recipe's, with data directories of one utterance."""
    monkeypatch.chdir(folder)
    for variable in ("LIBRISPEECH", "SPEECHOCEAN762", "FSDD"):
        monkeypatch.delenv(variable, raising=False)
    Path("conf").symlink_to(RECIPE / "conf")
    Path("u.wav").write_bytes(b"audio")
    for name in SETS:
        data = Path("data") / name
        data.mkdir(parents=True)
        (data / "wav.scp").write_text(f"{name} {folder / 'u.wav'}\n")
        (data / "text").write_text(f"{name} WORDS OF {name.upper()}\n")
        (data / "utt2spk").write_text(f"{name} speaker\n")
    return folder


def stages(*options: str) -> set[int]:
    """The stages of which a step would run or be refused with these options."""
    args = parse(list(options))
    judge = Steps(Content(args.dumpdir / "memory", keep=False))
    said = list(forecast(plan(Layout(args)), judge, range(1, LAST_STAGE + 1)))
    rerun = {step.stage for step, what in said if not what.startswith(("up to", "skipped"))}
    always = {step.stage for step, what in said if what == "would run: always done"}
    others = {
        step.stage
        for step, what in said
        if not what.startswith(("up to", "skipped")) and what != "would run: always done"
    }
    return rerun - (always - others)


def pretend_done(*options: str) -> None:
    """Stamp all steps as done, without doing them."""
    args = parse(list(options))
    judge = Steps(Content(args.dumpdir / "memory", keep=False))
    for step in plan(Layout(args)):
        if not step.skipped and not step.always:
            judge.begin(step)
            object.__setattr__(step, "products", lambda: ())
            judge.end(step)
