"""The options of the recipe: names and meanings of ESPnet's asr.sh, and a few of our own."""

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from espnet_kv.cli import Parser, true_or_false, whole
from espnet_kv.errors import UserError
from espnet_kv.recipe import conversion, whisper_models
from espnet_kv.recipe import option_types as types
from espnet_kv.recipe.cluster_config import CLASSES
from espnet_kv.recipe.corpora import CORPORA, name_sources
from espnet_kv.recipe.format import AUDIO_FORMATS
from espnet_kv.recipe.jobs import check_gpus, cores
from espnet_kv.recipe.publishing import NAMES, check_publishing, repository, stage_number

STAGES = {
    1: "data preparation",
    2: "speed perturbation",
    3: "format wav.scp",
    4: "drop long and short utterances",
    5: "token list",
    6: "LM statistics",
    7: "LM training",
    8: "LM perplexity",
    9: "n-gram training",
    10: "ASR statistics",
    11: "ASR training",
    12: "decoding",
    13: "scoring",
    14: "profiling of cache, time and memory",
    15: "comparison of the profiled models",
    16: "packing",
    17: "upload to the Hugging Face Hub",
    18: "export to ONNX",
}
LAST_STAGE = max(STAGES)
COPIES = {
    "librispeech_100": "LIBRISPEECH",
    "mini_librispeech": "LIBRISPEECH",
    "speechocean762": "SPEECHOCEAN762",
    "digits": "FSDD",
}
"""Corpus -> the environment variable that names an existing copy."""
DECODE, DECODE_STREAMING = Path("conf/decode_asr.yaml"), Path("conf/decode_asr_streaming.yaml")


NEUTRAL = {
    "stage": "which stages run",
    "stop_stage": "which stages run",
    "dry_run": "whether anything runs",
    "nj": "how much runs at once",
    "inference_nj": "how much runs at once",
    "train_nj": "how much runs at once",
    "gpu_inference": "where decoding runs",
    "cluster": "where it runs",
    "cluster_config": "where it runs",
    "allow_pipes": "whether commands in wav.scp are refused",
    "download_dir": "where downloads are kept",
    "results": "where the tables go",
}
"""Options on which no result depends, and what they are for instead."""
DIRECTORIES = ("asr_exp", "asr_stats_dir", "lm_exp", "lm_stats_dir", "ngram_exp")
"""Directories below --expdir that may have names of their own, as in asr.sh."""
PLACES = {"datadir", "dumpdir", "expdir", "lang", "asr_tag", "lm_tag", "inference_tag"}
PLACES |= set(DIRECTORIES)
"""Options that name outputs: another value makes other ones and leaves those that are there."""


def parser() -> argparse.ArgumentParser:
    """The parser behind `run.sh --help`."""
    called = {number: f" ({name})" for name, number in NAMES.items()}
    stages = "\n".join(f"  {n:2d}  {what}{called.get(n, '')}" for n, what in STAGES.items())
    p = Parser(
        prog="run.sh",
        description="Train, decode and score speech recognition models with small KV caches.",
        epilog=f"stages, by number or by the name in brackets:\n{stages}\n"
        "16, 17 and 18 run with --skip_packing, --skip_upload_hf and --skip_export false, or if "
        "--stage\nnames them. 16 and 17 are stages 14 and 15 of asr.sh inside an ESPnet checkout.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(group, name: str, default, text: str, **kwargs) -> None:
        shown = "true" if default is True else "false" if default is False else default
        if isinstance(default, bool):
            kwargs["type"] = true_or_false
        kwargs.setdefault("metavar", name.upper())
        suffix = f" (default: {shown})" if shown not in (None, "") else ""
        group.add_argument(f"--{name}", default=default, help=text + suffix, **kwargs)

    g = p.add_argument_group("what runs")
    add(g, "stage", 1, "first stage", type=stage_number)
    add(g, "stop_stage", LAST_STAGE, "last stage", type=stage_number)
    some = whole(1, 10_000)
    add(g, "nj", min(32, cores()), "parallel jobs of data stages", type=some)
    add(g, "inference_nj", min(32, cores()), "parallel jobs of decoding", type=some)
    add(g, "train_nj", 1, "models trained at the same time", type=some)
    ngpu = "GPUs of one training; 0 = CPU (default: 1 if there is one)"
    add(g, "ngpu", None, ngpu, type=whole(0))
    add(g, "gpu_inference", False, "decode on the GPU")
    add(g, "cluster", None, "run on workers: " + ", ".join(CLASSES), choices=CLASSES)
    add(g, "cluster_config", None, "their YAML, see conf/cluster", type=types.path_or_none)
    add(g, "dumpdir", Path("dump"), "formatted audio", type=Path)
    add(g, "expdir", Path("exp"), "experiments", type=Path)
    add(g, "datadir", Path("data"), "Kaldi data directories", type=Path)
    for name in DIRECTORIES:
        add(g, name, None, "its directory (default: one below expdir)", type=types.path_or_none)

    add(g, "dry_run", False, "print which steps would run and why, and stop")

    g = p.add_argument_group("data")
    add(g, "corpus", "librispeech_100", f"one of {', '.join(CORPORA)}")
    add(
        g,
        "corpus_dir",
        None,
        "existing copy of the corpus, instead of a download (or set LIBRISPEECH, SPEECHOCEAN762 "
        "or FSDD, see db.sh)",
        type=types.path_or_none,
    )
    add(g, "librispeech", None, "the same as corpus_dir, for LibriSpeech", type=types.path_or_none)
    add(g, "download_dir", Path("downloads"), "where downloads go", type=Path)
    own = " (default: the corpus's; kaldi: paths of your own)"
    add(g, "train_set", "", f"data directory for training{own}")
    add(g, "valid_set", "", f"data directory for validation{own}")
    sets = f"data directories to decode, split by spaces{own}"
    add(g, "test_sets", "", sets, type=types.shell_words)
    for corpus, unit in (("synth", "sentences"), ("digits", "strings of each speaker")):
        for part in ("train", "dev", "test"):
            sets = "the training set" if part == "train" else f"each of the {part} sets"
            add(g, f"{corpus}_{part}", None, f"{corpus}: {unit} in {sets}", type=whole(1))
        add(g, f"{corpus}_seed", None, f"{corpus}: seed", type=whole(0))
    add(g, "speed_perturb_factors", "0.9 1.0 1.1", "stage 2; empty: none")
    add(g, "audio_format", "flac.ark", "flac.ark, flac, wav.ark or wav", choices=AUDIO_FORMATS)
    add(g, "fs", 16000, "sampling rate of the dump in Hz, 16000 or 16k", type=types.hertz)
    add(g, "min_wav_duration", 0.1, "seconds; shorter training utterances go", type=types.seconds)
    add(g, "max_wav_duration", 30.0, "seconds; longer training utterances go", type=types.seconds)
    add(g, "allow_pipes", False, "run the commands that a wav.scp names, as Kaldi does")
    add(g, "lang", "en", "language, part of names", type=types.tag)
    kinds = ("bpe", "char", *whisper_models.TOKEN_TYPES)
    add(g, "token_type", "bpe", " or ".join(kinds), choices=kinds)
    cleaners = ("none", "whisper_en", "whisper_basic")
    add(g, "cleaner", "none", "normalisation of Whisper's texts", choices=cleaners)
    add(g, "nbpe", 5000, "BPE pieces", type=whole(1))
    add(g, "bpemode", "unigram", "unigram or bpe", choices=("unigram", "bpe"))
    add(g, "bpe_char_cover", 1.0, "character coverage of the BPE", type=types.share)

    g = p.add_argument_group("language model")
    add(g, "use_lm", False, "train a language model and decode with it")
    add(g, "lm_config", Path("conf/train_lm_transformer.yaml"), "its configuration", type=Path)
    add(g, "lm_args", "", "more options for espnet2.bin.lm_train", type=types.shell_words)
    add(
        g,
        "lm_tag",
        "",
        "name of its experiment (default: made of config and tokens)",
        type=types.tag,
    )
    add(g, "inference_lm", "valid.loss.ave.pth", "its model file")
    add(g, "use_ngram", False, "train an n-gram and decode with it (needs KenLM)")
    add(g, "ngram_num", 4, "order of the n-gram", type=whole(1))

    g = p.add_argument_group("speech recognition model")
    add(
        g,
        "asr_config",
        "conf/train_asr_conformer_mha.yaml",
        "training configuration, or several, split by spaces",
        type=types.shell_words,
    )
    add(
        g,
        "overlay",
        None,
        "YAML laid over asr_config, e.g. a smaller size",
        type=types.path_or_none,
    )
    add(
        g,
        "asr_tag",
        "",
        "name of the experiment (default: made of config and tokens)",
        type=types.tag,
    )
    add(g, "asr_args", "", "more options for espnet2.bin.asr_train", type=types.shell_words)
    add(g, "whisper_model", "", "encoder's and decoder's: a name, FILE.pt or a directory")
    add(g, "feats_normalize", "global_mvn", "normalisation of features")
    add(g, "use_streaming", False, "decode piece by piece, with a cache")
    add(
        g,
        "inference_config",
        None,
        f"decoding options (default: {DECODE}, or {DECODE_STREAMING} with --use_streaming)",
        type=types.path_or_none,
    )
    add(
        g,
        "inference_tag",
        "",
        "name of the decoding (default: made of config and model)",
        type=types.tag,
    )
    add(
        g,
        "inference_args",
        "",
        "more options for asr_inference, or asr_inference_streaming",
        type=types.shell_words,
    )
    add(g, "inference_asr_model", "valid.acc.ave.pth", "model file to decode with")
    g = p.add_argument_group("conversion of a trained model, in the place of training")
    add(g, "convert_from", None, "experiment of the trained model", type=types.path_or_none)
    add(g, "attention_type", "", "what its attention becomes: mla, gqa, linear")
    add(g, "kv_rank", "", "mla: numbers in a latent, or several, split by spaces")
    add(g, "num_kv_heads", "", "gqa: key/value heads, or several")
    add(g, "feature_map", "", "linear: hedgehog, elu, relu, or several")
    add(g, "target_compression", "", "mla, gqa: part of the cache that goes, 0.875, or several")
    add(g, "convert_parts", "encoder", "which attention: encoder, decoder_self, decoder_cross")
    add(g, "calibration_minutes", 10.0, "training audio to fit to; 0 = none", type=float)
    add(g, "convert_seed", 0, "of the choice of that audio", type=int)
    add(g, "finetune_epochs", 0, "epochs of training after the conversion", type=whole(0))
    add(g, "finetune_iters", None, "batches of each of them (default: all)", type=whole(1))
    add(
        g, "finetune_lr", None, "their learning rate (default: a tenth of the source's)", type=float
    )
    add(g, "finetune_control", False, "fine-tune the source as well, unconverted")

    g = p.add_argument_group("profiling")
    add(
        g,
        "profile_args",
        "",
        "more options for espnet_kv.bin.profile (stage 14)",
        type=types.shell_words,
    )

    g = p.add_argument_group("packing, upload and export")
    own = "(default: true, unless --stage"
    add(g, "skip_packing", None, f"leave stage 16 out {own} pack)", type=true_or_false)
    add(g, "skip_upload_hf", None, f"leave stage 17 out {own} upload)", type=true_or_false)
    add(g, "skip_export", None, f"leave stage 18 out {own} export)", type=true_or_false)
    export = "more options for espnet_kv.bin.export"
    add(g, "export_args", "", export, type=types.shell_words)
    add(g, "hf_repo", "", "repository USER/NAME of the Hugging Face Hub", type=repository)

    g = p.add_argument_group("results")
    add(
        g,
        "results",
        None,
        "tables of stages 13 and 15 (default: EXPDIR/RESULTS.md)",
        type=types.path_or_none,
    )
    return p


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the options of the recipe.

    Returns:
        The namespace of `parser`, with train_set, valid_set and test_sets (a list) resolved,
        asr_config a list of paths, speed_perturb_factors a list of floats.

    Raises:
        UserError: an unknown option, corpus, configuration or stage.
    """
    args = _parse_with_defaults(arguments)
    for name in ("stage", "stop_stage"):
        if getattr(args, name) not in STAGES:
            raise UserError(
                f"--{name} {getattr(args, name)}: there are stages 1 to {LAST_STAGE} (see --help)"
            )
    if args.stage > args.stop_stage:
        raise UserError(f"--stage {args.stage} is above --stop_stage {args.stop_stage}")
    _name_sets(args)
    try:
        args.speed_perturb_factors = [float(x) for x in args.speed_perturb_factors.split()]
    except ValueError as error:
        raise UserError(f"--speed_perturb_factors: {error}") from error
    _check_conversion(args)
    args.asr_config = [Path(name) for name in dict.fromkeys(shlex.split(args.asr_config))]
    if not args.asr_config:
        raise UserError("--asr_config is empty: name a configuration, such as those in conf/")
    args.inference_config = args.inference_config or (
        DECODE_STREAMING if args.use_streaming else DECODE
    )
    if args.convert_from is not None:
        # stages go by configurations: those of the experiments that the conversion makes
        args.asr_config = [exp / "config.yaml" for exp in conversion.experiments(args)]
    check_publishing(args)
    configs = () if args.convert_from else args.asr_config
    for path in (*configs, args.inference_config, args.overlay):
        if path is not None and not path.is_file():
            raise UserError(f"{path} does not exist: choose one of those in conf/")
    for name in ("use_lm", "use_ngram"):
        if args.use_streaming and getattr(args, name):
            raise UserError(
                f"--use_streaming true --{name} true: streaming decodes with the model alone; "
                f"give --{name} false"
            )
    for name in ("asr_tag", "asr_exp"):
        if getattr(args, name) and len(args.asr_config) > 1:
            raise UserError(f"--{name} names one experiment, but --asr_config lists several")
    stems = Counter(path.stem for path in args.asr_config)
    if args.convert_from is None and (same := [stem for stem, n in stems.items() if n > 1]):
        raise UserError(
            f"--asr_config lists two files named {same[0]}, whose experiments would have one name: "
            "train them one by one with --asr_tag"
        )
    if args.stage <= 11 <= args.stop_stage and args.ngpu:
        check_gpus(args.ngpu, "--ngpu")
    if args.stage <= 12 <= args.stop_stage and args.gpu_inference and not args.cluster:
        check_gpus(1, "--gpu_inference")
    args.results = args.results or args.expdir / "RESULTS.md"
    args.command = shlex.join(["./run.sh", *(sys.argv[1:] if arguments is None else arguments)])
    return args


def _parse_with_defaults(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with what suits the corpus in the place of the parser's own defaults."""
    chosen = parser()
    args = chosen.parse_args(arguments)
    if args.corpus not in CORPORA:
        raise UserError(f"--corpus {args.corpus}: unknown (allowed: {', '.join(CORPORA)})")
    defaults = dict(CORPORA[args.corpus].defaults) | whisper_models.suited(args)
    if args.use_streaming:
        defaults.pop("inference_config", None)  # it is one of whole utterances
    chosen.set_defaults(**defaults)
    return chosen.parse_args(arguments)


def _name_sets(args: argparse.Namespace) -> None:
    """Resolve the names of the data sets, and the user's own directories behind them."""
    corpus = CORPORA[args.corpus]
    given = [args.train_set, args.valid_set, *shlex.split(args.test_sets)]
    args.sources = {}
    if args.corpus == "kaldi":
        for option in ("train_set", "valid_set", "test_sets"):
            if not getattr(args, option).strip():
                raise UserError(
                    f"--{option}: --corpus kaldi needs it, the path of a Kaldi data directory"
                )
        args.sources = name_sources(map(Path, given), args.datadir)
        names = {path: name for name, path in args.sources.items()}
        given = [names[Path(path).resolve()] for path in given]
    elif bad := [name for name in given if "/" in name or name in (".", "..")]:
        raise UserError(
            f"{bad[0]}: a set is named as its directory below --datadir is; for directories "
            "elsewhere give --corpus kaldi"
        )
    variable = COPIES.get(args.corpus, "")
    args.corpus_dir = (
        args.corpus_dir
        or (args.librispeech if variable == "LIBRISPEECH" else None)
        or types.path_or_none(_environment(variable))
    )
    args.train_set = given[0] or corpus.train_set
    args.valid_set = given[1] or corpus.valid_set
    args.test_sets = list(dict.fromkeys(given[2:])) or list(corpus.test_sets)


def _environment(variable: str) -> str:
    """Where an existing copy lies; ESPnet's db.sh says `downloads` for what is to be downloaded."""
    given = os.environ.get(variable, "")
    return "" if given == "downloads" else given


def _check_conversion(args: argparse.Namespace) -> None:
    """Refuse what a conversion, or its absence, would leave unused."""
    if args.convert_from is None:
        names = ["attention_type", *(name for name, _ in conversion.SIZES.values())]
        for name in (*names, "target_compression", "finetune_epochs", "finetune_control"):
            if getattr(args, name):
                raise UserError(f"--{name}: goes with --convert_from")
    else:
        for name in ("asr_config", "asr_tag", "asr_exp"):
            if getattr(args, name) != parser().get_default(name):
                raise UserError(f"--{name}: --convert_from goes by the config of the source")
