"""Stages 1 to 5: from a corpus to formatted audio and a token list."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from espnet_kv.recipe import corpora, whisper_models
from espnet_kv.recipe.content import audio_files
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.format import format_audio
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.lengths import filter_lengths
from espnet_kv.recipe.perturb import perturb_speed
from espnet_kv.recipe.steps import STAMP, Step, read_stamp
from espnet_kv.recipe.tokens import list_characters, train_bpe

KALDI_FILES = ("wav.scp", "segments", "text", "utt2spk", "spk2utt")
SIZES = {
    name: (f"{name}_train", f"{name}_dev", f"{name}_test", f"{name}_seed")
    for name in ("synth", "digits")
}
"""Generated corpus -> options of its sizes."""


def prepare_step(layout: Layout) -> Step:
    """Stage 1: data/SET from a download, an existing copy, Kaldi directories or a synthesizer."""
    args = layout.args
    options = {name: getattr(args, name) for name in SIZES.get(args.corpus, ())}
    options["corpus_dir"] = _corpus_dir(layout)
    options |= {f"the directory of {name}": str(path) for name, path in args.sources.items()}
    reads = {
        f"{name}/{file}": source / file
        for name, source in args.sources.items()
        for file in KALDI_FILES
    }
    sets = args.sources or corpora.CORPORA[args.corpus].sets
    return Step(
        stage=1,
        name="data",
        output=args.datadir,
        build=partial(_prepare, layout),
        options={"corpus": args.corpus, **options},
        reads=reads,
        products=lambda: [layout.data(name) / "wav.scp" for name in sets],
        sign=layout.data(args.train_set) / "wav.scp",
        in_place=True,
        keep_given=True,
        editable=True,
    )


def _corpus_dir(layout: Layout) -> str | None:
    """The existing copy of the corpus to read; if not given, that of the previous run."""
    if layout.args.corpus in ("synth", "kaldi"):
        return None
    if layout.args.corpus_dir is not None:
        return str(layout.args.corpus_dir)
    stamp = read_stamp(layout.args.datadir / STAMP) or {"facts": {"options": {}}}
    options = stamp["facts"]["options"]
    return options.get("corpus_dir") if options.get("corpus") == layout.args.corpus else None


def _prepare(layout: Layout) -> None:
    args = layout.args
    given = _corpus_dir(layout)
    copy = None if given is None else Path(given)
    sizes = {
        name.partition("_")[2]: getattr(args, name)
        for name in SIZES.get(args.corpus, ())
        if getattr(args, name) is not None
    }
    corpora.prepare(
        args.corpus,
        args.datadir,
        librispeech=copy,
        source=copy,
        download_dir=args.download_dir,
        nj=args.nj,
        synth=corpora.SynthOptions(**sizes) if args.corpus == "synth" else None,
        digits=corpora.DigitsOptions(**sizes) if args.corpus == "digits" else None,
        sources=args.sources,
        allow_pipes=args.allow_pipes,
    )


def perturb_step(layout: Layout, prepare: Step) -> Step:
    """Stage 2: data/TRAIN_sp, the speed-perturbed training set."""
    args = layout.args
    src, dst = layout.data(args.train_set), layout.data(layout.train_set)
    factors = args.speed_perturb_factors
    return Step(
        stage=2,
        name=f"perturb {args.train_set}",
        output=dst,
        build=lambda: perturb_speed(src, dst, factors, args.nj, allow_pipes=args.allow_pipes),
        options={"speed_perturb_factors": factors},
        reads=_kaldi_files(src),
        audio=[src],
        after=[prepare],
        products=lambda: [dst / "wav.scp", dst / "text", *_files(dst, dst)],
        given=False,
        skipped="" if layout.perturbed else _unused(layout) or "no --speed_perturb_factors",
    )


def format_step(layout: Layout, name: str, before: Step) -> Step:
    """Stage 3: audio of one format and rate; before: the step of data/NAME."""
    args = layout.args
    src, dst = layout.data(name), layout.formatted(name)
    is_test = name in args.test_sets

    return Step(
        stage=3,
        name=f"format {name}",
        output=dst,
        build=lambda: format_audio(
            src,
            dst,
            args.fs,
            args.audio_format,
            args.nj,
            keep_all=is_test,
            allow_pipes=args.allow_pipes,
        ),
        options={"fs": args.fs, "audio_format": args.audio_format, "test_sets": is_test},
        reads=_kaldi_files(src),
        audio=[] if name == layout.train_set and layout.perturbed else [src],
        after=[before],
        products=lambda: [*_dump_files(dst), *_files(dst, dst)],
        skipped="" if is_test else _unused(layout),
    )


def lengths_step(layout: Layout, name: str, formatted: Step) -> Step:
    """Stage 4: training and validation sets without utterances that are too short or too long."""
    args = layout.args
    low, high = args.min_wav_duration, args.max_wav_duration
    shortest = layout.shortest_seconds
    src, dst = layout.formatted(name), layout.dump(name)
    return Step(
        stage=4,
        name=f"lengths {name}",
        output=dst,
        build=lambda: filter_lengths(src, dst, low, high, shortest_seconds=shortest),
        options={"min_wav_duration": max(low, shortest), "max_wav_duration": high},
        after=[formatted],
        products=lambda: _dump_files(dst),
        skipped=_unused(layout),
    )


def tokens_step(layout: Layout, prepare: Step) -> Step:
    """Stage 5: data/en_token_list, from the transcripts of the training set of stage 1."""
    args = layout.args
    if args.token_type in whisper_models.TOKEN_TYPES:
        return whisper_models.tokens_step(layout)
    out, text = layout.token_dir, layout.data(args.train_set) / "text"

    def build() -> None:
        data = DataDir.read(text.parent, allow_pipes=args.allow_pipes)
        lines = data.text.values()
        if args.token_type == "char":
            list_characters(lines, out)
        else:
            train_bpe(lines, out, args.nbpe, args.bpemode, args.bpe_char_cover)

    names = ["token_type"]
    if args.token_type == "bpe":
        names += ["nbpe", "bpemode", "bpe_char_cover"]
    return Step(
        stage=5,
        name=f"tokens {layout.tokens_name}",
        output=out,
        build=build,
        options={name: getattr(args, name) for name in names},
        reads={"text": text},
        after=[prepare],
        version=2 if args.token_type == "char" else 1,
        products=lambda: [layout.token_list, *([layout.bpe_model] if layout.bpe_model else [])],
    )


def _unused(layout: Layout) -> str:
    return "" if layout.needs_training_sets else "max_epoch 0"


def _kaldi_files(directory: Path) -> dict[str, Path]:
    return {name: directory / name for name in KALDI_FILES}


def _dump_files(directory: Path) -> list[Path]:
    names = ("wav.scp", "text", "utt2spk", "feats_type", "audio_format", "utt2num_samples")
    return [directory / name for name in names]


def _files(data_dir: Path, below: Path) -> Sequence[Path]:
    """The audio files of a data directory that are in the folder `below`."""
    return [path for path in audio_files(data_dir) if path.is_relative_to(below)]
