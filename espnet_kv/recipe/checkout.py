"""Inside an ESPnet checkout: ESPnet's asr.sh drives stages 1 to 13, our own driver those after.

    python -m espnet_kv.recipe.checkout ESPNET/egs2/TEMPLATE/asr1 --stage 1 --stop_stage 13 ...

Options are sorted and checked before anything runs: those of both drivers, of ours alone, of asr.sh
alone (whatever variables its first lines set). asr.sh gets the names of experiments and decodings
that our stages look for, and lengths, test sets, texts and decoding options as ours has them.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from espnet_kv.bin.doctor import SCTK
from espnet_kv.cli import command
from espnet_kv.errors import UserError
from espnet_kv.recipe.asr_sh import asr_sh_call
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import STAGES, parse, parser
from espnet_kv.recipe.plan import plan
from espnet_kv.recipe.pool import end_groups, terminate_on_signals
from espnet_kv.recipe.scoring import publish

KENLM = "the Python package kenlm"
LAST = 13
"""The last stage that asr.sh drives; its 14 and 15 pack and upload, see packing.py."""
LINKS = ("asr.sh", "scripts", "pyscripts", "steps", "utils")
OUR_DATA = "librispeech_100"
"""The corpus that asr.sh is driven for; the recipe's others are our own driver's."""

CARRIED = {"corpus", "corpus_dir", "librispeech", "download_dir", "allow_pipes", "overlay"}
CARRIED |= {"dry_run", "profile_args", "results", "skip_packing", "skip_upload_hf", "hf_repo"}
CARRIED |= {"whisper_model", "skip_export", "export_args"}
"""Options of ours alone that have their meaning in stages of asr.sh too, or in ours after it."""
NO_MEANING = {
    "train_nj": "asr.sh trains one model after the other",
    "datadir": "asr.sh keeps data directories in data/",
    "cluster": "asr.sh starts jobs as its cmd.sh says",
    "cluster_config": "asr.sh starts jobs as its cmd.sh says",
}
"""Other options of ours alone, which only the default of is taken, and why."""
NAMED_BY_US = {
    "inference_ngram": "give --ngram_num",
    "python": "set the variable python",
    "feats_type": "models with a KV cache are trained on audio, feats_type raw",
    "asr_task": "the recipe's models are of the task asr",
    "download_model": "give its experiment with --convert_from, or call ./asr.sh",
    "use_k2": "decoding with k2 has no cache; call ./asr.sh",
    "use_maskctc": "the recipe's models are no Mask-CTC models",
}
"""Options of asr.sh alone that cannot be given here, and what to do instead."""
UNKNOWN = """
import functools, importlib, sys
parser = functools.reduce(getattr, sys.argv[2].split("."), importlib.import_module(sys.argv[1]))()
known = parser._option_string_actions
for name in sys.argv[3:]:
    if not any(one.startswith(name) for one in known):
        sys.exit(f"unknown {name}")
"""
"""Exits with a name that a parser does not know; argparse takes the beginning of one, too."""
HELD = """
exec 3<&0 </dev/null
(exec >/dev/null 2>&1; read -r <&3; kill -KILL 0) &
exec "$@" 3<&-
"""
"""Runs a command in a process group that is killed when standard input, a pipe, is closed: when
the process that started it has ended, even by `kill -9`."""


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages asked for.

    Args:
        arguments: the folder TEMPLATE/asr1 of the checkout, and options of run.sh; sys.argv when
            None.

    Raises:
        UserError: bad options, a missing tool, or a stage that failed, in one line.
    """
    template, *words = sys.argv[1:] if arguments is None else arguments
    theirs = options_of(Path(template) / "asr.sh")
    ours, more = sort_options(words, theirs)
    if "help" in ours:
        parser().print_help()
        print(
            f"\nstages 1 to {LAST} take these options of asr.sh, too:\n  {' '.join(sorted(theirs))}"
        )
        return
    args = parse(_as_words(ours))
    args.command = shlex.join(["./run.sh", *words])
    if args.corpus != OUR_DATA or args.convert_from is not None:
        if more:
            why = "--convert_from" if args.convert_from is not None else f"--corpus {args.corpus}"
            raise UserError(f"--{min(more)}: an option of asr.sh, which takes no part with {why}")
        os.execv("./kv_asr.sh", ["./kv_asr.sh", *_as_words(ours)])
    _check(args, more, theirs)
    layout = Layout(args)
    plan(layout)  # reads all configurations
    _check_more_options(args)
    if args.stage <= LAST:
        _add_tools(args, more)
    calls = commands(layout, more)
    if args.dry_run:
        for call in calls:
            print(shlex.join(call))
    else:
        for name in LINKS:  # asr.sh packs and uploads, too
            link(name, Path(template))
        with terminate_on_signals():
            for call in calls:
                _run(call)
    if args.stage <= LAST <= args.stop_stage and not args.dry_run:
        places = [layout.decoded(c, name) for c in args.asr_config for name in args.test_sets]
        scored = [place for place in places if (place / "score_wer/result.txt").is_file()]
        if scored:
            publish(layout, scored)
    if args.stop_stage > LAST:
        if args.stage <= LAST:
            ours["stage"] = str(LAST + 1)
        sys.stdout.flush()
        os.execv("./kv_asr.sh", ["./kv_asr.sh", *_as_words(ours)])


def options_of(asr_sh: Path) -> dict[str, str]:
    """Option of an asr.sh -> its default: the variables that are set before its help."""
    try:
        head = asr_sh.read_text(encoding="utf-8").split("help_message=", 1)[0]
    except OSError as error:
        raise UserError(f"{asr_sh} cannot be read: {error.strerror}") from error
    return dict(re.findall(r"^([a-z]\w*)=(\S*)", head, re.MULTILINE))


def sort_options(
    words: Sequence[str], theirs: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Options of our driver, of which many are asr.sh's too, and options of asr.sh alone.

    As in asr.sh, dashes in a name count as underscores and the last of equal options counts.

    Raises:
        UserError: an option of neither, or one without a value.
    """
    known = {action.dest for action in parser()._actions}
    ours: dict[str, str] = {}
    more: dict[str, str] = {}
    rest = list(words)
    while rest:
        word, is_equal, value = rest.pop(0).partition("=")
        if word in ("-h", "--help"):
            ours["help"] = ""
            continue
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or (name not in known and name not in theirs):
            raise UserError(f"{word}: neither run.sh nor ESPnet's asr.sh takes it (see --help)")
        if not is_equal:
            if not rest:
                raise UserError(f"{word} needs a value")
            value = rest.pop(0)
        (ours if name in known else more)[name] = value
    return ours, more


def link(name: str, template: Path) -> None:
    """Link what asr.sh expects beside it to the checkout's own, as ESPnet's setup.sh does.

    Raises:
        UserError: the checkout has no such file.
    """
    path, target = Path(name), Path("../../TEMPLATE/asr1", name)
    if path.exists():
        return
    if not target.exists():  # the recipe is a link into the checkout
        target = template / name
        if not target.exists():
            raise UserError(f"{target} does not exist: use ESPnet 202611 or newer, complete")
    path.unlink(missing_ok=True)  # a link that leads nowhere
    path.symlink_to(target)


def commands(layout: Layout, more: Mapping[str, str]) -> list[list[str]]:
    """The calls of asr.sh: all stages for the first model, those of its own for every other.

    Args:
        more: options of asr.sh alone.
    """
    args = layout.args
    first, last = args.stage, min(args.stop_stage, LAST)
    calls = []
    done: set[Path] = set()
    for config in args.asr_config:
        stats = layout.stats(config)
        begin = first if not done else max(first, 11 if stats in done else 10)
        done.add(stats)
        if begin <= last:
            calls.append(asr_sh_call(layout, config, begin, last, more))
    return calls


def _check(args: argparse.Namespace, more: dict[str, str], theirs: Mapping[str, str]) -> None:
    """Refuse what asr.sh would misread, ignore, or end on long after the start."""
    for name, value in more.items():
        if name in NAMED_BY_US:
            raise UserError(f"--{name}: {NAMED_BY_US[name]}")
        if theirs[name] in ("true", "false") and value not in ("true", "false"):
            raise UserError(f"--{name} {value}: neither true nor false")
        if args.stage > LAST:
            raise UserError(f"--{name}: an option of asr.sh, which drives stages 1 to {LAST} only")
    if args.stage > LAST:
        return
    for name, why in NO_MEANING.items():
        if getattr(args, name) != parser().get_default(name):
            raise UserError(f"--{name}: stages 1 to {LAST} are ESPnet's asr.sh here: {why}")
    if args.train_set in (args.valid_set, *args.test_sets):
        raise UserError(f"--train_set {args.train_set}: asr.sh needs other sets beside it")
    if (
        args.stage > 3
        and (made := args.dumpdir / "raw" / args.valid_set / "audio_format").is_file()
    ):
        args.audio_format = made.read_text(encoding="utf-8").strip()
    for name in ("asr_args", "lm_args", "inference_args"):
        words = shlex.split(getattr(args, name))
        if split := [word for word in words if re.search(r"\s", word)]:
            raise UserError(f"--{name}: asr.sh would split {split[0]!r}; put it into a YAML")
        setattr(args, name, " ".join(words))


def _check_more_options(args: argparse.Namespace) -> None:
    """Refuse what no command of the stages asked for takes, before the hours that lead there.

    The commands' parsers come with ESPnet, which this process does without.
    """
    suffix = "_streaming" if args.use_streaming else ""
    for option, (stage, module, parser_of) in {
        "lm_args": (7, "espnet2.tasks.lm", "LMTask.get_parser"),
        "asr_args": (11, "espnet2.tasks.asr", "ASRTask.get_parser"),
        "inference_args": (12, f"espnet_kv.bin.asr_inference{suffix}", "get_parser"),
        "profile_args": (14, "espnet_kv.bin.profile", "get_parser"),
        "export_args": (18, "espnet_kv.bin.export", "get_parser"),
    }.items():
        words = [word.split("=")[0] for word in shlex.split(getattr(args, option))]
        names = [word for word in words if word.startswith("--")]
        if names and args.stage <= stage <= args.stop_stage:
            call = [sys.executable, "-c", UNKNOWN, module, parser_of, *names]
            errors = subprocess.run(call, capture_output=True, text=True).stderr
            if unknown := re.search(r"^unknown (--\S+)$", errors, re.MULTILINE):
                raise UserError(f"--{option}: {unknown[1]}: {module} has no such option")


def _add_tools(args: argparse.Namespace, more: Mapping[str, str]) -> None:
    """Name every missing program that the stages asked for need.

    Raises:
        UserError: says how to install them.
    """
    if shutil.which("sclite") is None and (SCTK / "sclite").is_file():
        os.environ["PATH"] += f":{SCTK}"
    stages = set(range(args.stage, min(args.stop_stage, LAST) + 1))
    stages -= {int(n) for n in re.findall(r"\d+", more.get("skip_stages", ""))}
    if not args.use_ngram:
        stages -= {9}
    for option, skipped in (
        ("skip_train", {2, 9}),
        ("skip_eval", {13}),
        ("skip_data_prep", {2, 3}),
    ):
        if more.get(option) == "true":
            stages -= skipped
    needed = {
        "perl": (set(STAGES), "apt-get install perl"),
        "sox": (set() if not args.speed_perturb_factors else {2, 3}, "apt-get install sox"),
        "lmplz": ({9}, "make -C ESPNET/tools kenlm.done"),
        "build_binary": ({9}, "make -C ESPNET/tools kenlm.done"),
        KENLM: ({12} if args.use_ngram else set(), "make -C ESPNET/tools kenlm.done"),
        "sclite": ({13}, "apt-get install sctk, or make -C ESPNET/tools sctk.done"),
    }
    missing = {
        name: how
        for name, (where, how) in needed.items()
        if where & stages and (shutil.which(name) if name != KENLM else find_spec("kenlm")) is None
    }
    if missing:
        last = {name: min(needed[name][0] & stages) for name in missing}
        said = "; ".join(f"{name} for stage {last[name]} ({how})" for name, how in missing.items())
        raise UserError(f"programs that ESPnet's asr.sh needs are missing: {said}")


def _run(call: Sequence[str]) -> None:
    """One call of asr.sh, which ends with this process.

    Raises:
        UserError: it failed.
    """
    held = ["bash", "-c", HELD, *call[:1], *call]
    process = subprocess.Popen(held, stdin=subprocess.PIPE, process_group=0)
    try:
        status = process.wait()
    except BaseException:
        end_groups([process.pid], process.poll)
        raise
    finally:
        process.stdin.close()  # type: ignore[union-attr]
    if status:
        raise UserError(f"asr.sh ended with status {status}: what it said last stands above")


def _as_words(options: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


if __name__ == "__main__":
    sys.exit(main())
