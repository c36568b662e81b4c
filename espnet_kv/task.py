"""ESPnet's ASR task with the plug-in registered and checkpoints loaded strictly."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml
from espnet2.tasks.asr import ASRTask as ESPnetASRTask
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor

from espnet_kv.checkpoint import check_finite, read_checkpoint, refuse_partial_loads
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.encoder.chunked import KVEncoder
from espnet_kv.errors import ConfigError, UserError, is_out_of_memory, one_line

# keys of a checkpoint that hold the statistics of the features
STATISTICS = ("normalize.mean", "normalize.std")


class ASRTask(ESPnetASRTask):
    """espnet2.tasks.asr.ASRTask; for ESPnet3, `task: espnet_kv.task.ASRTask`.

    Naming it (or pickling it for a spawned process) imports `espnet_kv`, which registers.
    """

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        """Build the model of `args`; it refuses checkpoints that do not fill it.

        Raises:
            ConfigError: a key of encoder_conf is not allowed.
        """
        model = super().build_model(args)
        for module in model.modules():
            if isinstance(module, KVEncoder | KVTransformerDecoder):
                module.load_guard.remove()  # the whole model's guard names all keys at once
        if not getattr(args, "use_adapter", False):  # adapters are saved without the model
            refuse_partial_loads(model)
        return model

    @classmethod
    def build_model_from_file(
        cls,
        config_file: Path | str | None = None,
        model_file: Path | str | None = None,
        device: str = "cpu",
    ) -> tuple[AbsESPnetModel, argparse.Namespace]:
        """Build a trained model, strictly.

        It loads from any working directory: statistics of features are read from the checkpoint,
        and other files that config.yaml names are looked for beside it and below the directories
        that hold it, too (`find_files`).

        Args:
            config_file: config.yaml of the training; None: the one beside `model_file`.
            model_file: the checkpoint; None: random weights.
            device: cpu, cuda or cuda:N.

        Raises:
            UserError: a file is missing, damaged or of another kind; the configuration builds no
                model; the checkpoint lacks keys, has others, or has them in other sizes, or holds
                NaN; or there is no GPU.
        """
        if config_file is None:
            if model_file is None:
                raise UserError("give a config.yaml, a model file or both")
            config_file = Path(model_file).parent / "config.yaml"
        named = config_file  # mypy does not carry what was found above into the class below
        config = read_config(named)
        checkpoint = {} if model_file is None else read_checkpoint(model_file)
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {device}: no GPU was found; use cpu")

        class Loading(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def build_model(inner, args: argparse.Namespace) -> AbsESPnetModel:
                vars(args).update(find_files(named, config))
                return build_filled(super().build_model, args, checkpoint, named)

        try:
            load = super(ASRTask, Loading).build_model_from_file  # type: ignore[misc]
            model, args = load(config_file, model_file, device)
        except UserError as error:
            if "does not fit" in str(error):
                raise UserError(f"{model_file}, {config_file}: {error}") from error
            raise
        except RuntimeError as error:
            if "loading state_dict" in str(error):
                raise UserError(f"{model_file}: {one_line(error)}") from error
            raise
        if model_file is not None:
            check_finite(model, model_file)
        return model, args


class CachedDecodingTask(ASRTask):
    """ASRTask for inference: a stock `transformer` decoder becomes kv_transformer."""

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        if getattr(args, "decoder", None) == "transformer":
            args.decoder = "kv_transformer"
        return super().build_model(args)


class TrainingTask(ASRTask):
    """ASRTask for training: a file given whole to --init_param must fill the model.

    ESPnet would leave what the file lacks (another attention, say) at its random start.
    """

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        """Build the model of `args`.

        Raises:
            UserError: files in init_param lack keys, or have them in other sizes.
        """
        model = super().build_model(args)
        files = list(getattr(args, "init_param", None) or [])
        parts = [file for file in files if ":" in file]  # FILE:FROM:TO takes a part on purpose
        if files and not parts and not args.ignore_init_mismatch:
            _check_init(model, files)
        return model


def read_config(
    file: Path | str, keys: Sequence[str] = ("encoder", "token_list")
) -> dict[str, Any]:
    """The mapping in a config.yaml.

    Args:
        keys: that it has to have, as those of a model of that kind.

    Raises:
        UserError: it is missing or none.
    """
    if not Path(file).exists():
        raise UserError(f"{file} does not exist")
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except IsADirectoryError as error:
        raise UserError(f"{file} is no config.yaml but a directory: name the file") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(
            f"{file} is no config.yaml of a trained model: {one_line(error)}"
        ) from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise UserError(f"{file} is no config.yaml of a trained model: it holds no keys")
    for key in keys:
        if not config.get(key):
            raise UserError(f"{file} is no config.yaml of a trained model: it names no {key}")
    return config


def find_files(config_file: Path | str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.yaml that name files, with paths that exist from here.

    ESPnet writes paths relative to the directory of the recipe. A path that is found nowhere is
    left out.
    """
    found: dict[str, Any] = {}
    for key in ("token_list", "bpemodel", "non_linguistic_symbols"):
        name = config.get(key)
        if isinstance(name, str) and (path := find_file(config_file, name)) is not None:
            found[key] = str(path)
    normalize = config.get("normalize_conf") or {}
    if config.get("normalize") and isinstance(name := normalize.get("stats_file"), str):
        path = find_file(config_file, name)
        if path is not None:
            found["normalize_conf"] = {**normalize, "stats_file": str(path)}
    return found


def find_file(config_file: Path | str, name: str) -> Path | None:
    """A file that a config.yaml names: beside it, below a directory that holds it, or here."""
    beside = Path(config_file).parent
    tries = [beside / Path(name).name]
    if Path(name).suffix == ".model":
        tries.append(beside / "bpe.model")  # as a conversion and the recipe call it
    tries += [root / name for root in Path(config_file).resolve().parents]
    return next((path for path in [*tries, Path(name)] if path.is_file()), None)


def build_filled(
    build: Any, args: argparse.Namespace, checkpoint: Mapping[str, Tensor], config_file: Path | str
) -> AbsESPnetModel:
    """build(args) for a checkpoint, from which GlobalMVN gets its statistics, not from its file.

    The file may be gone, or of a model with another front end.

    Args:
        build: of a task, e.g. ASRTask.build_model.
        config_file: where args come from, for messages.

    Raises:
        UserError: the arguments build no model, or name a file that does not exist.
    """
    conf = getattr(args, "normalize_conf", None)
    try:
        if args.normalize != "global_mvn" or not set(STATISTICS) <= set(checkpoint):
            return build(args)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "feats_stats.npz"
            write_statistics(file, checkpoint)
            args.normalize_conf = {**(conf or {}), "stats_file": str(file)}
            return build(args)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} does not exist, but {config_file} names it: put it there, or beside "
            "config.yaml"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}") from error
    except (UserError, OSError):
        raise
    except Exception as error:  # what ESPnet's classes say of arguments that they cannot use
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{config_file} builds no model: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        if conf is not None:
            args.normalize_conf = conf


def write_statistics(file: Path | BinaryIO, checkpoint: Mapping[str, Tensor]) -> None:
    """Write the statistics of features that a checkpoint holds as a feats_stats.npz."""
    mean, std = (checkpoint[key].double().numpy() for key in STATISTICS)
    # of the type that it has there, which is the one that the model's buffers get
    dtype = np.float64 if checkpoint[STATISTICS[0]].dtype == torch.float64 else np.float32
    np.savez(file, count=1, sum=mean.astype(dtype), sum_square=(std**2 + mean**2).astype(dtype))


def _check_init(model: AbsESPnetModel, files: list[str]) -> None:
    given: dict[str, torch.Size] = {}
    for file in files:
        try:
            given |= {key: value.shape for key, value in read_checkpoint(file).items()}
        except UserError as error:
            raise UserError(f"--init_param {error}") from error
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    missing = [key for key in wanted if key not in given]
    resized = [key for key in wanted if given.get(key, wanted[key]) != wanted[key]]
    if missing or resized:
        raise UserError(
            f"--init_param {' '.join(files)} does not fill the model (is it from another "
            f"attention_type or config?): missing keys: {', '.join(missing) or 'none'}; other "
            f"sizes: {', '.join(resized) or 'none'}; to take a part only: FILE:encoder:encoder"
        )
