"""ESPnet's ASR task with the plug-in registered and checkpoints loaded strictly."""

import argparse
from pathlib import Path

import torch
from espnet2.tasks.asr import ASRTask as ESPnetASRTask
from espnet2.train.abs_espnet_model import AbsESPnetModel

from espnet_kv.config import plain_names
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.encoder.chunked import KVEncoder
from espnet_kv.errors import ArgumentError, UserError, one_line
from espnet_kv.espnet.loading import (
    build_filled,
    check_finite,
    find_files,
    read_checkpoint,
    read_config,
    refuse_partial_loads,
)


class ASRTask(ESPnetASRTask):
    """espnet2.tasks.asr.ASRTask; for ESPnet3, `task: espnet_kv.espnet.task.ASRTask`.

    Naming it (or pickling it for a spawned process) imports `espnet_kv`, which registers.
    """

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> AbsESPnetModel:
        """Build the model of `args`; it refuses checkpoints that do not fill it.

        Raises:
            ConfigError: a key of encoder_conf is not allowed.
        """
        vars(args).update(plain_names(vars(args)))
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
    """ASRTask for training: a file given whole to init_param must fill the model.

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
