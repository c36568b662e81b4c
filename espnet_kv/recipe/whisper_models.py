"""Whisper in the recipe: what suits its tokens, options that do not go together, the token list."""

import argparse
import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from espnet_kv.errors import UserError
from espnet_kv.files import new_directory
from espnet_kv.recipe.jobs import Job
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.steps import Step

TOKEN_TYPES = ("whisper_en", "whisper_multilingual")
DECODE = Path("conf/decode_asr_whisper.yaml")
EXAMPLE = "conf/tuning/train_asr_whisper_tiny_finetune.yaml"
SAMPLE_RATE, WINDOW = 16000, 30.0
"""Hz, and the seconds that an encoder takes; the module of these names loads torch."""
SYMBOLS = {"sym_sos": "<|startoftranscript|>", "sym_eos": "<|endoftext|>"}


def suited(args: argparse.Namespace) -> dict[str, Any]:
    """Defaults that suit Whisper's tokens; empty with other tokens."""
    if args.token_type not in TOKEN_TYPES:
        return {}
    cleaner = "whisper_en" if args.lang in ("en", "noinfo") else "whisper_basic"
    return {
        "cleaner": cleaner,
        "feats_normalize": "none",
        "inference_config": DECODE,
        "overlay": None,
    }


def check(layout: Layout) -> None:
    """Refuse options that ESPnet would use without a word, or end on after hours.

    Raises:
        UserError: names the option or the configuration.
    """
    args = layout.args
    ours = args.token_type in TOKEN_TYPES
    if args.cleaner != "none" and not ours:
        raise UserError(f"--cleaner {args.cleaner}: goes with --token_type {TOKEN_TYPES[0]}")
    for name in ("use_lm", "use_ngram"):
        if ours and getattr(args, name):
            raise UserError(
                f"--{name} true: there is no language model of {args.token_type} tokens, because "
                "ESPnet's end with the last token of the list; leave it false"
            )
    if args.token_type == "whisper_multilingual":
        from espnet2.text.whisper_tokenizer import LANGUAGES_CODE_MAPPING

        if args.lang not in LANGUAGES_CODE_MAPPING:
            known = ", ".join(sorted(LANGUAGES_CODE_MAPPING))
            raise UserError(f"--lang {args.lang}: no language of ESPnet's Whisper ({known})")
    configs = {file: layout.model_config(file) for file in layout.source_configs if file.is_file()}
    needed = ours
    for file, config in configs.items():
        if ours:
            _check_tokens(args, file, config)
        if _has_whisper(config, "encoder"):
            _check_audio(args, file)
            needed = True
        elif args.whisper_model:
            raise UserError(f"--whisper_model: {file} has encoder: {config['encoder']}")
    if needed and importlib.util.find_spec("whisper") is None:
        raise UserError("openai-whisper is not installed: pip install 'espnet_kv[whisper]'")


def _check_tokens(args: argparse.Namespace, file: Path, config: dict[str, Any]) -> None:
    """Whisper's tokens begin, end and are counted as in its own decoder."""
    given, decoder = f"--token_type {args.token_type}", config.get("decoder")
    if not _has_whisper(config, "decoder"):
        raise UserError(f"{given}: {file} has decoder: {decoder}; take kv_whisper, as in {EXAMPLE}")
    symbols = config.get("model_conf") or {}
    for key, symbol in SYMBOLS.items():
        if symbols.get(key) != symbol:
            raise UserError(f'{given}: {file} needs {key}: "{symbol}" in model_conf')
    english = args.token_type == "whisper_en"
    name = str((config.get("decoder_conf") or {}).get("whisper_model", "small"))
    suited = TOKEN_TYPES[0 if name.endswith(".en") else 1]
    if not weights(config) and args.token_type != suited:
        raise UserError(f"{given}: the tokens of whisper_model {name} are {suited}")
    language = (config.get("preprocessor_conf") or {}).get("whisper_language") or "en"
    if not english and args.lang not in ("noinfo", language):
        raise UserError(
            f"--lang {args.lang}: {file} has whisper_language {language} in preprocessor_conf"
        )


def _check_audio(args: argparse.Namespace, file: Path) -> None:
    """Whisper takes whole audio of one rate, up to its window, and normalises features itself."""
    if args.use_streaming:
        raise UserError(f"--use_streaming true: the Whisper model of {file} does not stream")
    if args.feats_normalize not in ("", "none"):
        raise UserError(
            f"--feats_normalize {args.feats_normalize}: the Whisper model of {file} normalises its "
            "features itself; give --feats_normalize none"
        )
    if args.fs != SAMPLE_RATE:
        raise UserError(f"--fs {args.fs}: the Whisper model of {file} takes {SAMPLE_RATE} Hz")
    if args.max_wav_duration > WINDOW:
        raise UserError(
            f"--max_wav_duration {args.max_wav_duration:g}: the Whisper model of {file} takes "
            f"{WINDOW:g} s"
        )


def _has_whisper(config: Mapping[str, Any], part: str) -> bool:
    return "whisper" in str(config.get(part))


def weights(config: Mapping[str, Any]) -> dict[str, Path]:
    """The file of a model's weights before training; empty: they are named, or none.

    Raises:
        UserError: it does not exist.
    """
    given = str((config.get("decoder_conf") or {}).get("whisper_model", ""))
    path = Path(given)
    if path.is_dir():
        return {"whisper_model": path / "model.bin"}
    if path.is_file():
        return {"whisper_model": path}
    if "/" in given or path.suffix == ".pt":
        raise UserError(f"whisper_model {given} does not exist")
    return {}


def tokens_step(layout: Layout) -> Step:
    """Stage 5: the token list of ESPnet's whisper_export_vocabulary, which reads no text."""
    args = layout.args
    out = layout.token_dir
    new = out.with_name(f".{out.name}.parts")

    def jobs() -> list[Job]:
        shutil.rmtree(new, ignore_errors=True)
        options = [
            *("--whisper_model", args.token_type, "--whisper_language", args.lang),
            *("--whisper_task", "transcribe", "--output", str(new / "tokens.txt")),
        ]
        log = out.with_name(f"{out.name}.log")
        return [Job(out.name, "espnet_kv.bin.whisper_export_vocabulary", options, log)]

    def build() -> None:
        with new_directory(out) as partial:
            shutil.copyfile(new / "tokens.txt", partial / "tokens.txt")
        shutil.rmtree(new)

    return Step(
        stage=5,
        name=f"tokens {layout.tokens_name}",
        output=out,
        build=build,
        options={"token_type": args.token_type, "lang": args.lang},
        jobs=jobs,
        products=lambda: [layout.token_list],
    )


def text_cleaner(layout: Layout) -> Callable[[str], str]:
    """What asr.sh does with references and hypotheses before they are compared."""
    cleaner = layout.token_options["cleaner"]
    if cleaner is None:
        return str
    from espnet2.text.cleaner import TextCleaner  # imports torch

    return TextCleaner(cleaner)
