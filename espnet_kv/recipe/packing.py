"""Stages 16 and 17: pack every model as ESPnet does, and upload a pack to the Hugging Face Hub."""

import contextlib
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError
from espnet_kv.files import new_file, write_text
from espnet_kv.recipe.archive import add_card, pack
from espnet_kv.recipe.asr_sh import asr_sh_call
from espnet_kv.recipe.card import figures, front_matter, usage
from espnet_kv.recipe.decode import require_model
from espnet_kv.recipe.hub import check_token, upload
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.results import write_page
from espnet_kv.recipe.steps import Step
from espnet_kv.scores import FILE

ASR_SH = Path("asr.sh")
"""Beside run.sh inside an ESPnet checkout, where ESPnet's own stages pack and upload."""


def pack_step(layout: Layout, config_file: Path, before: Sequence[Step]) -> Step:
    """Stage 16: EXPERIMENT/EXPERIMENT_MODEL.zip, named and made as by ESPnet's asr.sh.

    Args:
        before: the training or conversion.
    """
    args = layout.args
    exp = layout.asr_exp(config_file)
    model, out = exp / args.inference_asr_model, packed_model(layout, config_file)
    reads = {
        "model": model,
        "config": exp / "config.yaml",
        "profile": exp / "profile/profile.json",
        **{str(file): file for file in _score_files(layout, config_file)},
    }
    if args.use_lm:
        reads |= {
            "lm": layout.lm_exp / args.inference_lm,
            "lm config": layout.lm_exp / "config.yaml",
        }

    def ready() -> None:
        for role in ("model", "config"):
            require_model(reads[role])
        if not reads["profile"].exists():
            print(f"  note: {exp.name} has no profile (stage 14): its card shows no cache sizes")

    def build() -> None:
        header = [usage(exp, out.name), "", figures(exp)]
        write_page(exp / "RESULTS.md", header, [exp])  # which asr.sh packs, and shows on the Hub
        with _scratch(exp) as scratch:
            if in_checkout(args):
                _asr_sh(layout, config_file, 14, skip_packing="false")
                made = out
            else:
                made = scratch / out.name
                pack(*_contents(layout, exp), scratch / "files", made)
            with new_file(out) as partial:
                add_card(made, partial, _card(layout, exp, out.name))
        print(f"  {out}", flush=True)

    return Step(
        stage=16,
        name=f"pack {exp.name}",
        output=exp,
        build=build,
        options={"inference_asr_model": args.inference_asr_model, "use_lm": args.use_lm},
        reads=reads,
        after=before,
        ready=ready,
        products=lambda: [out],
        stamp=exp / f".{out.stem}.packed.done.json",
        in_place=True,
        given=False,
        skipped="--skip_packing true" if args.skip_packing else "",
    )


def _score_files(layout: Layout, config_file: Path) -> list[Path]:
    """Those that there are, and those of this run's decoding, which may still be made."""
    exp = layout.asr_exp(config_file)
    made = {layout.decoded(config_file, name) / FILE for name in layout.args.test_sets}
    for place in ("*/*", "*/org/*"):
        for file in (FILE, "score_wer/result.txt"):
            made |= set(exp.glob(f"{place}/{file}"))
    return sorted(made)


def upload_step(layout: Layout, config_file: Path, packed: Step) -> Step:
    """Stage 17: the files of a pack in the repository --hf_repo of the Hugging Face Hub."""
    args = layout.args
    exp, zip_file = layout.asr_exp(config_file), packed_model(layout, config_file)

    def build() -> None:
        if in_checkout(args):
            _asr_sh(layout, config_file, 15, skip_upload_hf="false", hf_repo=args.hf_repo)
            return
        with _scratch(exp) as scratch:
            with zipfile.ZipFile(zip_file) as archive:
                archive.extractall(scratch)
            write_text(scratch / "README.md", _card(layout, exp, args.hf_repo))
            print(f"  {upload(args.hf_repo, scratch)}", flush=True)

    return Step(
        stage=17,
        name=f"upload {exp.name}",
        output=exp,
        build=build,
        options={"hf_repo": args.hf_repo},
        reads={"pack": zip_file},
        # whether it is up to date, also where this run does not make it
        after=[replace(packed, skipped="")],
        ready=lambda: None if in_checkout(args) else check_token(args.hf_repo),
        stamp=exp / f".{zip_file.stem}.uploaded.done.json",
        in_place=True,
        given=False,
        skipped="--skip_upload_hf true" if args.skip_upload_hf else "",
    )


def packed_model(layout: Layout, config_file: Path) -> Path:
    """The zip of a model, named as ESPnet's asr.sh names it."""
    exp, model = layout.asr_exp(config_file), layout.args.inference_asr_model
    return exp / f"{exp.name}_{model.rpartition('.')[0] or model}.zip"


def in_checkout(args: Any) -> bool:
    """Whether ESPnet's asr.sh packs and uploads."""
    return ASR_SH.is_file() and args.corpus == "librispeech_100" and args.convert_from is None


def _card(layout: Layout, exp: Path, name: str) -> str:
    """README.md of a pack that from_pretrained finds under `name`."""
    head = front_matter(layout.args.lang, layout.args.corpus)
    parts = [head, f"# {exp.name}", usage(exp, name), figures(exp), "More: RESULTS.md."]
    return "\n\n".join(parts) + "\n"


def _contents(layout: Layout, exp: Path) -> tuple[dict[str, Path], list[Path]]:
    """What asr.sh packs: files by their names in meta.yaml, and more that are there."""
    args, lm = layout.args, layout.lm_exp
    files = {
        "asr_train_config": exp / "config.yaml",
        "asr_model_file": exp / args.inference_asr_model,
    }
    more = [exp / "RESULTS.md", exp / "images"]
    if args.use_lm:
        files |= {"lm_train_config": lm / "config.yaml", "lm_file": lm / args.inference_lm}
        more += [*sorted(lm.glob("perplexity_*/ppl")), lm / "images"]
    return files, [path for path in more if path.exists()]


def _asr_sh(layout: Layout, config_file: Path, stage: int, **more: str) -> None:
    """Run one stage of ESPnet's asr.sh for one model.

    Raises:
        UserError: it failed.
    """
    exp = layout.asr_exp(config_file)
    (exp / "images").mkdir(exist_ok=True)  # it packs the directory, plots or not
    log = exp / f"asr_sh_stage{stage}.log"
    with log.open("w", encoding="utf-8") as file:
        call = asr_sh_call(layout, config_file, stage, stage, more)
        ended = subprocess.run(call, stdout=file, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(f"stage {stage} of asr.sh failed ({''.join(last)}); see {log}")


@contextlib.contextmanager
def _scratch(exp: Path) -> Iterator[Path]:
    """A directory on the same disk as the experiment, which is removed afterwards."""
    name = ".packing.partial"
    for old in exp.glob(f"{name}*"):  # of a run that was killed
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=exp, prefix=name) as folder:
        yield Path(folder)
