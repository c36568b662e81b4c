"""Names and places: what the recipe's options make of dump, token list and experiments."""

import argparse
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from espnet_kv.config import front_end, load_config, load_yaml
from espnet_kv.errors import UserError
from espnet_kv.files import write_text
from espnet_kv.recipe.lengths import shortest_seconds

DEFAULT_CONFIG = Path("conf/train_asr_conformer_mha.yaml")
LONGEST_NAME = 230
"""Bytes: file systems allow 255, and logs and unfinished files add to a name."""


@dataclass(frozen=True)
class Layout:
    """Where the stages put things, named as ESPnet's asr.sh names them.

    `--lang noinfo`, asr.sh's default, leaves the language out of names.

    args: the options (`espnet_kv.recipe.options.parse`).
    """

    args: argparse.Namespace

    @property
    def perturbed(self) -> bool:
        return self.needs_training_sets and self.args.speed_perturb_factors not in ([], [1.0])

    @property
    def train_set(self) -> str:
        """The training set after stage 2."""
        return self.args.train_set + ("_sp" if self.perturbed else "")

    def data(self, name: str) -> Path:
        return self.args.datadir / name

    def formatted(self, name: str) -> Path:
        """Stage 3, whole: training and validation sets wait for stage 4 below org/.

        A test set is decoded from here, so that one that serves as validation set as well keeps
        its long and short utterances.
        """
        filtered = name in (self.train_set, self.args.valid_set)
        return self.args.dumpdir / "raw" / "org" / name if filtered else self.dump(name)

    def dump(self, name: str) -> Path:
        """What training reads: for training and validation sets the result of stage 4."""
        return self.args.dumpdir / "raw" / name

    def set_of(self, mode: str) -> Path:
        """The dump of "train" or "valid"."""
        return self.dump(self.train_set if mode == "train" else self.args.valid_set)

    @property
    def source_configs(self) -> list[Path]:
        """Configurations that are there before anything is trained or converted."""
        if self.args.convert_from is not None:
            return [self.args.convert_from / "config.yaml"]
        return self.args.asr_config

    def model_config(self, config_file: Path) -> dict[str, Any]:
        """A training configuration with the overlay laid over it.

        Raises:
            UserError: the file is no configuration of an ASR model.
        """
        overlay = None if self.args.convert_from else self.args.overlay
        config = load_config(config_file, overlay)
        if not isinstance(config.get("encoder"), str):
            raise UserError(f"{config_file}: no encoder is named; this is no ASR training config")
        if self.args.whisper_model and self.args.convert_from is None:
            for key in ("encoder_conf", "decoder_conf"):
                config[key] = (config.get(key) or {}) | {"whisper_model": self.args.whisper_model}
        return config

    def trains(self, config_file: Path) -> bool:
        """Whether a configuration has epochs; `max_epoch: 0` keeps the weights it begins with."""
        return last_epoch(self.model_config(config_file), self.args.asr_args) > 0

    @cached_property
    def needs_training_sets(self) -> bool:
        """Whether anything is made from the dumps of the training and validation sets."""
        args = self.args
        language_models = args.use_lm or args.use_ngram
        return bool(language_models or args.convert_from or any(map(self.trains, args.asr_config)))

    @property
    def shortest_seconds(self) -> float:
        """Length of the shortest utterance that every configured encoder can take."""
        there = [file for file in self.source_configs if file.is_file()]
        lengths = [shortest_seconds(self.model_config(file), self.args.fs) for file in there]
        return max(lengths, default=0.0)

    def audio_type(self, dump: Path) -> str:
        """ESPnet's type of the audio of a dump that is there, which asr.sh may have made."""
        file = dump / "audio_format"
        there = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        return "kaldi_ark" if (there or self.args.audio_format).endswith("ark") else "sound"

    @property
    def tokens_name(self) -> str:
        """bpe5000, or char."""
        return self.args.token_type + (str(self.args.nbpe) if self.args.token_type == "bpe" else "")

    @property
    def _language(self) -> str:
        return "" if self.args.lang == "noinfo" else f"{self.args.lang}_"

    @property
    def token_dir(self) -> Path:
        args = self.args
        folder = f"bpe_{args.bpemode}{args.nbpe}" if args.token_type == "bpe" else args.token_type
        return args.datadir / f"{self._language}token_list" / folder

    @property
    def token_list(self) -> Path:
        return self.token_dir / "tokens.txt"

    @property
    def bpe_model(self) -> Path | None:
        return self.token_dir / "bpe.model" if self.args.token_type == "bpe" else None

    @property
    def token_options(self) -> dict[str, Any]:
        """ESPnet's options for this token list, the same for recognizer and language model."""
        kind = self.args.token_type
        whisper = kind if kind.startswith("whisper") else None
        return {
            "use_preprocessor": True,
            "token_type": kind,
            "token_list": str(self.token_list),
            "bpemodel": whisper if self.bpe_model is None else str(self.bpe_model),
            "non_linguistic_symbols": None,
            "cleaner": None if self.args.cleaner == "none" else self.args.cleaner,
            "g2p": None,
        }

    @property
    def data_options(self) -> dict[str, Any]:
        """ESPnet's options for tokens and data, the same for statistics and training."""
        options = self.token_options
        for mode in ("train", "valid"):
            dump = self.set_of(mode)
            options[f"{mode}_data_path_and_name_and_type"] = [
                [str(dump / "wav.scp"), "speech", self.audio_type(dump)],
                [str(dump / "text"), "text", "text"],
            ]
        return options

    def shape_files(self, stats: Path, mode: str) -> list[Path]:
        """What batches of "train" or "valid" are made of."""
        return [stats / mode / "speech_shape", self.text_shape(stats, mode)]

    def text_shape(self, stats: Path, mode: str) -> Path:
        """Lengths of the transcripts with the vocabulary size, as batches are sized by."""
        return stats / mode / f"text_shape.{self.args.token_type}"

    def write_text_shapes(self, stats: Path) -> None:
        """Write `text_shape` of both modes from the lengths that statistics left in `stats`."""
        vocabulary = self.token_list.read_text(encoding="utf-8").count("\n")
        for mode in ("train", "valid"):
            lengths = (stats / mode / "text_shape").read_text(encoding="utf-8").splitlines()
            lines = "".join(f"{line},{vocabulary}\n" for line in lengths)
            write_text(self.text_shape(stats, mode), lines)

    @property
    def _sp(self) -> str:
        return "_sp" if self.perturbed else ""

    def stats(self, config_file: Path) -> Path:
        """asr.sh's name; models of another front end than the recipe's have their own.

        Raises:
            UserError: models of different front ends are to share a directory.
        """
        if self.args.asr_stats_dir is not None:
            configs = map(self.model_config, self.source_configs)
            ends = [front_end(config, self.args.asr_args) for config in configs]
            if any(end != ends[0] for end in ends):
                raise UserError(
                    "--asr_stats_dir names one directory, but --asr_config lists models with "
                    "different front ends: train them one by one"
                )
            return self.args.asr_stats_dir
        name = f"asr_stats_raw_{self._language}{self.tokens_name}{self._sp}"
        wanted = front_end(self.model_config(config_file), self.args.asr_args)
        if wanted != front_end(load_yaml(DEFAULT_CONFIG), ""):
            name += f"_{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]}"
        return self.args.expdir / name

    def asr_exp(self, config: Path) -> Path:
        """The experiment of one training configuration, which a converted model holds itself."""
        if self.args.convert_from is not None:
            return config.parent
        name = f"asr_{self.args.asr_tag or self._asr_tag(config)}"
        return self.args.asr_exp or self.args.expdir / _checked(name, "asr_tag")

    def _asr_tag(self, config: Path) -> str:
        more = _in_a_name(self.args.asr_args)
        tag = f"{config.stem}_raw_{self._language}{self.tokens_name}{more}{self._sp}"
        return tag + self.laid_over

    @property
    def laid_over(self) -> str:
        """What changes a configuration, as part of a name."""
        weights = Path(self.args.whisper_model).name.removesuffix(".pt")
        overlay = self.args.overlay.stem if self.args.overlay else ""
        return "".join(f"_{name}" for name in (weights, overlay) if name)

    @property
    def lm_stats(self) -> Path:
        name = f"lm_stats_{self._language}{self.tokens_name}"
        return self.args.lm_stats_dir or self.args.expdir / name

    @property
    def lm_exp(self) -> Path:
        config, more = self.args.lm_config.stem, _in_a_name(self.args.lm_args)
        tag = self.args.lm_tag or f"{config}_{self._language}{self.tokens_name}{more}"
        return self.args.lm_exp or self.args.expdir / _checked(f"lm_{tag}", "lm_tag")

    @property
    def ngram(self) -> Path:
        folder = self.args.ngram_exp or self.args.expdir / "ngram"
        return folder / f"{self.args.ngram_num}gram.bin"

    @property
    def inference_name(self) -> str:
        """decode_asr_..._asr_model_valid.acc.ave: the directory of a decoding."""
        args = self.args
        if args.inference_tag:
            return args.inference_tag
        name = args.inference_config.stem
        if args.use_streaming and "streaming" not in name:
            name += "_streaming"  # else it would overwrite the decoding of whole utterances
        name += _in_a_name(args.inference_args, slash="_")
        if args.use_lm:
            name += f"_lm_{self.lm_exp.name}_{_model_in_a_name(args.inference_lm)}"
        if args.use_ngram:
            name += f"_ngram_{self.ngram.parent.name}_{self.ngram.stem}"
        name += f"_asr_model_{_model_in_a_name(args.inference_asr_model)}"
        return _checked(name, "inference_tag")

    def decoded(self, config: Path, name: str) -> Path:
        """What a model makes of a test set; one that is the validation set is below org/."""
        place = self.asr_exp(config) / self.inference_name
        return place / "org" / name if name == self.args.valid_set else place / name


def last_epoch(config: Mapping[str, Any], more: str) -> int:
    """Epochs of a training: max_epoch in the options `more`, else in the configuration.

    Raises:
        UserError: it is no whole number.
    """
    words = shlex.split(more.replace("=", " "))
    given = config.get("max_epoch", 40)
    if "--max_epoch" in words[:-1]:
        given = words[words.index("--max_epoch") + 1]
    try:
        return int(given)
    except (TypeError, ValueError) as error:
        raise UserError(f"max_epoch {given}: a whole number is needed") from error


def _in_a_name(options: str, slash: str = "") -> str:
    """Options as part of a name: `--max_epoch 3` is `_max_epoch3`."""
    for old, new in (("--", "_"), ("/", slash)):
        options = options.replace(old, new)
    return "".join(c for c in options if c not in "|=" and not c.isspace())


def _checked(name: str, tag: str) -> str:
    """The name of a directory, which the option `tag` sets.

    Raises:
        UserError: it is too long for a file system.
    """
    if (length := len(name.encode())) > LONGEST_NAME:
        raise UserError(
            f"{name[:40]}...: the name of a directory of {length} bytes, and {LONGEST_NAME} are "
            f"allowed: name it yourself with --{tag}"
        )
    return name


def _model_in_a_name(file: str) -> str:
    stem, dot, _ = file.replace("/", "_").rpartition(".")
    return stem if dot else file.replace("/", "_")
