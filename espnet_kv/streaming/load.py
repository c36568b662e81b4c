"""Trained models for streaming: loaded strictly, and refused in one line where they cannot."""

import argparse
import pickle
from pathlib import Path

import yaml
from espnet2.text.abs_tokenizer import AbsTokenizer
from espnet2.text.build_tokenizer import build_tokenizer
from espnet2.train.abs_espnet_model import AbsESPnetModel

from espnet_kv.encoder.base import KVEncoder
from espnet_kv.errors import ConfigError, UserError
from espnet_kv.task import ASRTask


def load_model(
    asr_train_config: Path | str,
    asr_model_file: Path | str,
    device: str = "cpu",
    task: type[ASRTask] = ASRTask,
) -> tuple[AbsESPnetModel, argparse.Namespace]:
    """task.build_model_from_file, with one line for each way in which the files can be wrong.

    Raises:
        UserError: a file is missing, damaged or of another kind, or the two do not fit.
    """
    for path in (asr_train_config, asr_model_file):
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist")
    try:
        return task.build_model_from_file(asr_train_config, asr_model_file, device)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} does not exist, but {asr_train_config} names it: run in the "
            "directory where the model was trained"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"{asr_train_config} is no config.yaml of a trained model: {_line(error)}"
        ) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(f"{asr_model_file} is no model file: {_line(error)}") from error


def check_streams(model: AbsESPnetModel, args: argparse.Namespace, ctc_weight: float) -> None:
    """Refuse what needs the whole utterance; the frontend and the encoder see to themselves.

    Raises:
        ConfigError: names the key of the training configuration.
    """
    if not isinstance(model.encoder, KVEncoder):
        raise ConfigError(
            f"encoder: {getattr(args, 'encoder', type(model.encoder).__name__)} does not stream; "
            "use kv_conformer, kv_branchformer or kv_e_branchformer"
        )
    if model.ctc is None:
        raise ConfigError(
            "model_conf.ctc_weight: 0.0 trained no CTC, which streaming searches with"
        )
    for key in ("preencoder", "postencoder"):
        if getattr(model, key) is not None:
            raise ConfigError(f"{key}: {type(getattr(model, key)).__name__} does not stream")
    if model.use_transducer_decoder and ctc_weight < 1:
        raise ConfigError("joint_net_conf: a transducer cannot rescore; decode with ctc_weight 1.0")
    if getattr(args, "speech_volume_normalize", None) is not None:
        raise ConfigError(
            "speech_volume_normalize needs the whole utterance; train with it set to null"
        )


def load_tokenizer(
    args: argparse.Namespace, token_type: str | None = None, bpemodel: str | None = None
) -> AbsTokenizer | None:
    """What turns tokens into text, as ESPnet's inference chooses it; None: nothing does.

    Args:
        args: the training configuration, for what is None.

    Raises:
        UserError: the sentencepiece model is missing.
    """
    token_type = token_type or args.token_type
    if token_type != "bpe":
        return build_tokenizer(token_type=token_type) if token_type else None
    bpemodel = bpemodel or args.bpemodel
    if bpemodel is None:
        return None
    if not Path(bpemodel).is_file():
        raise UserError(
            f"bpemodel {bpemodel} does not exist: run in the directory where the model was "
            "trained, or give --bpemodel"
        )
    return build_tokenizer(token_type="bpe", bpemodel=bpemodel)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
