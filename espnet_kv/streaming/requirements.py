"""Check that a trained model can be streamed."""

import argparse

from espnet2.train.abs_espnet_model import AbsESPnetModel

from espnet_kv.encoder.chunked import KVEncoder
from espnet_kv.errors import ConfigError


def check_streams(model: AbsESPnetModel, args: argparse.Namespace, ctc_weight: float) -> None:
    """Refuse models that need the whole utterance; frontend and encoder check their own options.

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
            "model_conf.ctc_weight: 0.0 trained no CTC, and streaming search needs CTC"
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
