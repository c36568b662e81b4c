"""Strict loading of trained models: config.yaml, checkpoints and tokenizers."""

import argparse
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from espnet_kv.errors import ArgumentError, ConfigError, UserError, is_out_of_memory, one_line
from espnet_kv.espnet.openai_whisper import build_within
from espnet_kv.names import plain_names

if TYPE_CHECKING:
    from espnet2.text.abs_tokenizer import AbsTokenizer
    from espnet2.train.abs_espnet_model import AbsESPnetModel

TOKEN_TYPES = ("bpe", "char", "word", "phn", "whisper_en", "whisper_multilingual", "hugging_face")
# keys of the feature statistics in a checkpoint
STATISTICS = ("normalize.mean", "normalize.std")
TOO_LARGE_STEPS = "lower lr in optim_conf or set use_amp: false"


class DamagedError(Exception):
    """A file of torch.save cannot be read: it is missing, truncated or damaged."""


def load_tensors(file: Path | str) -> Any:
    """Load a file of `torch.save` on the CPU, without running code in it.

    Files of torch before 1.6, which are not zip files, can be read too. Tensors of a zip file are
    mapped into memory and read only when they are used.

    Raises:
        DamagedError: the file cannot be read; its __cause__ is the reason.
    """
    try:
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:  # damaged bytes can cause any exception
        if is_out_of_memory(error):
            raise
        first = next(iter(str(error).splitlines()), "").split(". ")[0].strip()
        raise DamagedError(f"{type(error).__name__}: {one_line(first)}") from error


def read_checkpoint(file: Path | str) -> dict[str, Tensor]:
    """Load the parameters and buffers of a model file; see `load_tensors`.

    Raises:
        UserError: the file is missing, damaged or not a model file.
    """
    path = Path(file)
    if not path.exists():
        raise UserError(f"{file} does not exist")
    if path.is_dir():
        raise UserError(f"{file} is a directory, not a model file: name a file in it")
    if not path.stat().st_size:
        raise UserError(f"{file} is not a model file: it is empty; copy or train it again")
    with path.open("rb"):  # raises errors of the system; below, any exception means damage
        pass
    try:
        state = load_tensors(file)
    except DamagedError as error:
        raise UserError(
            f"{file} is not a model file, or it is damaged ({error}): copy or train it again"
        ) from error
    for wrapper in ("module", "state_dict"):  # DeepSpeed, Lightning
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise UserError(f"{file} is not a model file: it holds a {type(state).__name__}")
    if isinstance(state.get("model"), Mapping) and "optimizers" in state:
        raise UserError(
            f"{file} is the state of a training, not a model file: name a model beside it, e.g. "
            "valid.acc.ave.pth"
        )
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is not a model file: it holds other things than named parameters")
    return dict(state)


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Keys of a state dict with nan or inf in their tensors."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return [key for key, value in tensors.items() if not value.isfinite().all()]


def refuse_not_finite(state: Mapping[str, Any], file: Path | str) -> None:
    """Check that the tensors of a model file are finite.

    Raises:
        UserError: names the file and the first such parameter or buffer.
    """
    if wrong := not_finite(state):
        raise UserError(
            f"{file}: {wrong[0]} holds nan or inf: the training diverged: use the model of an "
            f"earlier epoch, or {TOO_LARGE_STEPS}, remove {Path(file).parent} and train again"
        )


def check_finite(model: nn.Module, file: Path | str) -> None:
    """Check that a model has no NaN, and no infinite parameters or feature statistics.

    Raises:
        UserError: see `refuse_not_finite`.
    """
    learnt = dict(model.named_parameters())
    # a buffer may hold inf on purpose, as a mask does
    refuse_not_finite(
        {
            key: value
            for key, value in model.state_dict().items()
            if key in learnt or key in STATISTICS or value.isnan().any()
        },
        file,
    )


def check_types(model: nn.Module, checkpoint: Mapping[str, Tensor], file: Path | str) -> None:
    """Check that floats of a model were floats in its file; loading converts any numbers.

    Raises:
        UserError: names the file and the first other parameter or buffer.
    """
    for key, value in model.state_dict().items():
        given = checkpoint.get(key, value)
        if value.is_floating_point() and not given.is_floating_point():
            raise UserError(
                f"{file}: {key} has numbers of type {str(given.dtype).removeprefix('torch.')}, not "
                "floats: take a model file that was not quantised or converted"
            )


class LoadGuard:
    """Makes every `load_state_dict` of a module strict, even with strict=False.

    Only keys of this module are checked, not other keys of the same load.

    Args:
        module: the module to guard.
    """

    def __init__(self, module: nn.Module):
        self._prefix = ""
        self._hooks = [
            module.register_load_state_dict_pre_hook(self._before),
            module.register_load_state_dict_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the guard."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._prefix = prefix  # prefix of the module's keys in the loaded state dict

    def _after(self, module: nn.Module, keys: Any) -> None:
        missing, unexpected = (
            [key for key in listed if key.startswith(self._prefix)]
            for listed in (keys.missing_keys, keys.unexpected_keys)
        )
        if missing or unexpected:
            raise UserError(
                f"the checkpoint does not fit {type(module).__name__} (is it from another "
                f"attention_type or config?): missing keys: {', '.join(missing) or 'none'}; "
                f"unexpected keys: {', '.join(unexpected) or 'none'}"
            )


def refuse_partial_loads(module: nn.Module) -> LoadGuard:
    """Make loading into a module strict.

    ESPnet loads trained models with strict=False; a checkpoint of another attention would silently
    leave random weights.

    Returns:
        The guard; its remove() allows partial loads again.

    Raises:
        UserError: (when loading) lists missing and unexpected keys.
    """
    return LoadGuard(module)


def read_config(
    file: Path | str, keys: Sequence[str] = ("encoder", "token_list")
) -> dict[str, Any]:
    """Read a config.yaml.

    Args:
        keys: required keys.

    Raises:
        UserError: the file is missing, not a YAML mapping, or lacks a required key.
    """
    if not Path(file).exists():
        raise UserError(f"{file} does not exist")
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except IsADirectoryError as error:
        raise UserError(f"{file} is a directory, not a config.yaml: name the file") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(
            f"{file} is not a config.yaml of a trained model: {one_line(error)}"
        ) from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise UserError(f"{file} is not a config.yaml of a trained model: it holds no keys")
    for key in keys:
        if not config.get(key):
            raise UserError(f"{file} is not a config.yaml of a trained model: it names no {key}")
    return plain_names(config)


def check_inference(file: Path | str, config: Mapping[str, Any]) -> None:
    """Check the keys of a config.yaml that recognition needs besides the model.

    Raises:
        UserError: names the file and the key.
    """
    for key in ("token_type", "use_preprocessor"):
        if key not in config:
            raise UserError(f"{file} is not a config.yaml of a trained model: it names no {key}")
    kind, tokens = config["token_type"], config["token_list"]
    if kind is not None and kind not in TOKEN_TYPES:
        raise UserError(f"{file}: token_type: {kind} (allowed: {', '.join(TOKEN_TYPES)})")
    rate = (config.get("frontend_conf") or {}).get("fs")
    if isinstance(rate, int | float) and not rate > 0:
        raise UserError(f"{file}: frontend_conf.fs: {rate} samples per second; give 1 or more")
    if not isinstance(tokens, list):
        return
    if wrong := [token for token in tokens if not isinstance(token, str)]:
        raise UserError(f"{file}: token_list: {wrong[0]!r} is no text; put it in quotes")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise UserError(f"{file}: token_list: {twice!r} occurs twice; keep that of the training")
    if "<unk>" not in tokens and kind in ("bpe", "char", "word", "phn"):
        raise UserError(f"{file}: token_list: there is no <unk>; keep that of the training")


def named_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a config.yaml that name a file -> its name.

    The tokenizers of Whisper are no files: `bpemodel` is then the name of one, e.g. whisper_en.
    """
    keys = ["token_list", "bpemodel", "non_linguistic_symbols"]
    if str(config.get("token_type")).startswith("whisper"):
        keys.remove("bpemodel")
    return {key: config[key] for key in keys if isinstance(config.get(key), str)}


def find_files(config_file: Path | str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config.yaml that name files, with existing paths; missing files are left out.

    ESPnet writes paths relative to the directory of the recipe.
    """
    found: dict[str, Any] = {}
    for key, file in named_files(config).items():
        if (path := find_file(config_file, file)) is not None:
            found[key] = str(path)
    normalize = config.get("normalize_conf") or {}
    if config.get("normalize") and isinstance(name := normalize.get("stats_file"), str):
        path = find_file(config_file, name)
        if path is not None:
            found["normalize_conf"] = {**normalize, "stats_file": str(path)}
    return found


def find_file(config_file: Path | str, name: str) -> Path | None:
    """Find a file of a config.yaml: beside it, relative to a parent directory, or from here."""
    beside = Path(config_file).parent
    tries = [beside / Path(name).name]
    if Path(name).suffix == ".model":
        tries.append(beside / "bpe.model")  # name in conversions and in the recipe
    tries += [root / name for root in Path(config_file).resolve().parents]
    return next((path for path in [*tries, Path(name)] if path.is_file()), None)


def build_filled(
    build: Any, args: argparse.Namespace, checkpoint: Mapping[str, Tensor], config_file: Path | str
) -> "AbsESPnetModel":
    """Call build(args) with the feature statistics of the checkpoint for GlobalMVN.

    The original statistics file may be missing, or belong to another front end.

    Args:
        build: build_model of a task, e.g. ASRTask.build_model.
        config_file: source of args, for messages.

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
    except Exception as error:  # ESPnet's classes raise any type for bad arguments
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{config_file} builds no model: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        if conf is not None:
            args.normalize_conf = conf


def write_statistics(file: Path | BinaryIO, checkpoint: Mapping[str, Tensor]) -> None:
    """Write the feature statistics of a checkpoint as a feats_stats.npz."""
    mean, std = (checkpoint[key].double().numpy() for key in STATISTICS)
    # keep the type, because the model's buffers get it
    dtype = np.float64 if checkpoint[STATISTICS[0]].dtype == torch.float64 else np.float32
    np.savez(file, count=1, sum=mean.astype(dtype), sum_square=(std**2 + mean**2).astype(dtype))


def load_tokenizer(
    args: argparse.Namespace, token_type: str | None = None, bpemodel: str | None = None
) -> "AbsTokenizer | None":
    """Build the tokenizer of a model as ESPnet's inference does; None: the model has none.

    Args:
        args: the training configuration.
        token_type, bpemodel: None: as in the training configuration.

    Raises:
        UserError: the sentencepiece model is missing or damaged, or the model has tokens of another
            type.
    """
    from espnet2.text.build_tokenizer import build_tokenizer

    if token_type and args.token_type and token_type != args.token_type:
        message = f"{token_type}: the model has {args.token_type} tokens; leave it out"
        raise ArgumentError("token_type", message)
    token_type = token_type or args.token_type
    if token_type and "whisper" in token_type:
        conf = getattr(args, "preprocessor_conf", None) or {}
        return build_within(build_tokenizer)(
            token_type=token_type,
            bpemodel=bpemodel or args.bpemodel,
            whisper_language=conf.get("whisper_language"),
            whisper_task=conf.get("whisper_task"),
        )
    if token_type != "bpe":
        return build_tokenizer(token_type=token_type) if token_type else None
    bpemodel = bpemodel or args.bpemodel
    if bpemodel is None:
        return None
    if not Path(bpemodel).is_file():
        raise UserError(
            f"bpemodel {bpemodel} does not exist: put it beside config.yaml as bpe.model, or give "
            "bpemodel"
        )
    tokenizer = build_tokenizer(token_type="bpe", bpemodel=bpemodel)
    try:
        tokenizer.tokens2text([])  # the model is read at the first use
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"bpemodel {bpemodel} is not a sentencepiece model, or is damaged"
        ) from error
    return tokenizer
