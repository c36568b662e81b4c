"""ESPnet's ASR task with the plug-in registered and checkpoints loaded strictly."""

import argparse
from pathlib import Path

import torch
from espnet2.tasks.asr import ASRTask as ESPnetASRTask
from espnet2.train.abs_espnet_model import AbsESPnetModel

from espnet_kv.checkpoint import refuse_partial_loads
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.encoder.base import KVEncoder
from espnet_kv.errors import UserError


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

        Raises:
            UserError: the checkpoint lacks keys, has others, or has them in other sizes.
        """
        try:
            return super().build_model_from_file(config_file, model_file, device)
        except RuntimeError as error:
            if "loading state_dict" in str(error):
                raise UserError(f"{model_file}: {' '.join(str(error).split())}") from error
            raise


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


def _check_init(model: AbsESPnetModel, files: list[str]) -> None:
    given: dict[str, torch.Size] = {}
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--init_param {file} does not exist")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        state = state.get("module", state)
        given |= {key: value.shape for key, value in state.items()}
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    missing = [key for key in wanted if key not in given]
    resized = [key for key in wanted if given.get(key, wanted[key]) != wanted[key]]
    if missing or resized:
        raise UserError(
            f"--init_param {' '.join(files)} does not fill the model (is it from another "
            f"attention_type or config?): missing keys: {', '.join(missing) or 'none'}; other "
            f"sizes: {', '.join(resized) or 'none'}; to take a part only: FILE:encoder:encoder"
        )
