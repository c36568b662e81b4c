"""ESPnet's ASR task with the plug-in registered and checkpoints loaded strictly."""

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from espnet2.tasks.asr import ASRTask as ESPnetASRTask
from espnet2.train.abs_espnet_model import AbsESPnetModel

from espnet_kv.errors import ArgumentError, UserError, one_line
from espnet_kv.espnet.loading import (
    build_filled,
    check_finite,
    check_inference,
    check_types,
    find_files,
    read_checkpoint,
    read_config,
    refuse_partial_loads,
)
from espnet_kv.espnet.openai_whisper import with_whisper
from espnet_kv.espnet.whisper_weights import weights_follow
from espnet_kv.names import plain_names


class ASRTask(ESPnetASRTask):
    """espnet2.tasks.asr.ASRTask; for ESPnet3, `task: espnet_kv.espnet.task.ASRTask`.

    Importing or unpickling it imports `espnet_kv`, which registers our classes.
    """

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        """Build the model of `args`; it refuses checkpoints that do not match all of its keys.

        Raises:
            ConfigError: a key of encoder_conf is not allowed.
        """
        vars(args).update(plain_names(vars(args)))
        with with_whisper(vars(args)):
            model = super().build_model(args)
        for part in ("encoder", "decoder"):
            module: Any = getattr(model, part, None)
            if hasattr(module, "load_guard"):
                module.load_guard.remove()  # the guard of the whole model names all keys at once
            if hasattr(module, "dims"):  # config.yaml says what whisper_model may no longer tell
                setattr(args, f"{part}_conf", getattr(args, f"{part}_conf") | {"dims": module.dims})
        if not getattr(args, "use_adapter", False):  # adapters are saved without the model
            refuse_partial_loads(model)
        return model

    @classmethod
    def build_preprocess_fn(cls, args: argparse.Namespace, train: bool) -> Any:
        """ESPnet's preprocessing; with Whisper's tokens also with PyPI's openai-whisper.

        Raises:
            UserError: the configuration has values that ESPnet's preprocessing cannot take.
        """
        try:
            with with_whisper(vars(args)):
                return super().build_preprocess_fn(args, train)
        except (TypeError, ValueError, AttributeError, AssertionError) as error:
            raise UserError(
                f"the configuration builds no preprocessor: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error

    @classmethod
    def build_model_from_file(
        cls,
        config_file: Path | str | None = None,
        model_file: Path | str | None = None,
        device: str = "cpu",
    ) -> tuple[AbsESPnetModel, argparse.Namespace]:
        """Build a trained model with strict loading.

        It works in any working directory: feature statistics are read from the checkpoint, and
        other files named in config.yaml are also searched beside it and relative to its parent
        directories (`find_files`).

        Args:
            config_file: config.yaml of the training; None: the one beside `model_file`.
            model_file: the checkpoint; None: random weights.
            device: cpu, cuda or cuda:N.

        Raises:
            UserError: a file is missing, damaged or of another kind; the configuration builds no
                model; the checkpoint has missing or unexpected keys, other sizes or NaN; or there
                is no GPU.
        """
        if config_file is None:
            if model_file is None:
                raise UserError("give a config.yaml, a model file or both")
            config_file = Path(model_file).parent / "config.yaml"
        named = config_file  # for mypy: not None in the class below
        config = read_config(named)
        check_inference(named, config)
        checkpoint = {} if model_file is None else read_checkpoint(model_file)
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {device}: no GPU was found; use cpu")

        class Loading(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def build_model(inner, args: argparse.Namespace) -> AbsESPnetModel:
                vars(args).update(find_files(named, config))
                with nullcontext() if model_file is None else weights_follow():
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
            check_types(model, checkpoint, model_file)
            check_finite(model, model_file)
        return model, args


class CachedDecodingTask(ASRTask):
    """ASRTask for inference with cached decoders in place of ESPnet's.

    `transformer` becomes kv_transformer, and `whisper` kv_whisper, the encoder too: ESPnet's drops
    what is longer than 30 s.
    """

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        if getattr(args, "decoder", None) in ("transformer", "whisper"):
            args.decoder = f"kv_{args.decoder}"
        if args.encoder == "whisper":
            args.encoder = "kv_whisper"
        return super().build_model(args)


class TrainingTask(ASRTask):
    """ASRTask for training; an init_param without key prefixes must contain all parameters.

    ESPnet would leave parameters that the file lacks at their random initialisation.
    """

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        """Build the model of `args`.

        Raises:
            UserError: files in init_param have missing keys or other sizes, or an adapter would
                change one of several layers with a common module.
        """
        files = list(getattr(args, "init_param", None) or [])
        parts = [file for file in files if ":" in file]  # FILE:FROM:TO selects a part on purpose
        whole = bool(files) and not parts and not args.ignore_init_mismatch
        resumed = args.resume and (Path(args.output_dir) / "checkpoint.pth").is_file()
        with weights_follow() if whole or resumed else nullcontext():
            model = super().build_model(args)
        if whole:
            _check_init(model, files)
        if getattr(args, "use_adapter", False):
            _check_adapters(model, args.adapter_conf or {})
        return model


def _check_init(model: AbsESPnetModel, files: list[str]) -> None:
    given: dict[str, torch.Size] = {}
    for file in files:
        try:
            given |= {key: value.shape for key, value in read_checkpoint(file).items()}
        except UserError as error:
            raise ArgumentError("init_param", f"{error}") from error
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    missing = [key for key in wanted if key not in given]
    resized = [key for key in wanted if given.get(key, wanted[key]) != wanted[key]]
    if missing or resized:
        raise ArgumentError(
            "init_param",
            f"{' '.join(files)} does not fill the model (is it from another "
            f"attention_type or config?): missing keys: {', '.join(missing) or 'none'}; other "
            f"sizes: {', '.join(resized) or 'none'}; to take a part only: FILE:encoder:encoder",
        )


def _check_adapters(model: AbsESPnetModel, conf: Mapping[str, Any]) -> None:
    """ESPnet puts LoRA into the first layer that has a module, not into others that share it."""
    targets = tuple(conf.get("target_modules") or ["query"])
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        same = first.setdefault(id(module), name)
        if same != name and (name.endswith(targets) or same.endswith(targets)):
            raise ArgumentError(
                "adapter_conf",
                f"target_modules: {same} and {name} are one (src_attention_conf has "
                "shared_latent: true), and only the first would be adapted; choose others",
            )
