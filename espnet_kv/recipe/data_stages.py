"""Stages 1 to 5: from a corpus to formatted audio and a token list."""

from functools import partial

from espnet_kv.recipe import corpora
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.format import format_audio
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.lengths import filter_lengths
from espnet_kv.recipe.perturb import perturb_speed
from espnet_kv.recipe.stamp import STAMP, once
from espnet_kv.recipe.tokens import list_characters, train_bpe


def prepare_data(layout: Layout) -> None:
    """Stage 1: data/SET from a download, an existing tree or the synthesizer."""
    args = layout.args
    sizes = {
        "train": args.synth_train,
        "dev": args.synth_dev,
        "test": args.synth_test,
        "seed": args.synth_seed,
    }
    chosen = {name: value for name, value in sizes.items() if value is not None}
    sets = corpora.CORPORA[args.corpus].sets
    if not all((args.datadir / name / "text").exists() for name in sets):
        (args.datadir / STAMP).unlink(missing_ok=True)
    once(
        args.datadir,
        lambda: corpora.prepare(
            args.corpus,
            args.datadir,
            librispeech=args.librispeech,
            download_dir=args.download_dir,
            nj=args.nj,
            synth=corpora.SynthOptions(**chosen),
        ),
        corpus=args.corpus,
        librispeech=str(args.librispeech),
        synth=chosen,
    )


def perturb(layout: Layout) -> None:
    """Stage 2: data/TRAIN_sp, the training set at several speeds."""
    args = layout.args
    if not layout.perturbed:
        print("  skipped: no --speed_perturb_factors")
        return
    src, dst = layout.data(args.train_set), layout.data(layout.train_set)
    factors = args.speed_perturb_factors
    once(dst, lambda: perturb_speed(src, dst, factors, args.nj), [src], factors=factors)


def format_sets(layout: Layout) -> None:
    """Stage 3: dump/raw, audio of one format and rate."""
    args = layout.args
    for name in dict.fromkeys([layout.train_set, args.valid_set, *args.test_sets]):
        src, dst = layout.data(name), layout.formatted(name)
        once(
            dst,
            partial(format_audio, src, dst, args.fs, args.audio_format, args.nj),
            [src],
            fs=args.fs,
            audio_format=args.audio_format,
        )


def drop_lengths(layout: Layout) -> None:
    """Stage 4: training and validation sets without what is too short or too long."""
    low, high = layout.args.min_wav_duration, layout.args.max_wav_duration
    for name in (layout.train_set, layout.args.valid_set):
        src, dst = layout.formatted(name), layout.dump(name)
        once(
            dst,
            partial(filter_lengths, src, dst, low, high),
            [src],
            min_wav_duration=low,
            max_wav_duration=high,
        )


def list_tokens(layout: Layout) -> None:
    """Stage 5: data/token_list, from the transcripts of the training set."""
    args = layout.args
    out, train_dir = layout.token_dir, layout.dump(layout.train_set)

    def build() -> None:
        lines = DataDir.read(train_dir).text.values()
        if args.token_type == "char":
            list_characters(lines, out)
        else:
            train_bpe(lines, out, args.nbpe, args.bpemode, args.bpe_char_cover)

    once(out, build, [train_dir], bpe_char_cover=args.bpe_char_cover)
