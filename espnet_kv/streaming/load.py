"""What of a trained model streams, and what turns its tokens into text."""

import argparse
from pathlib import Path

from espnet2.text.abs_tokenizer import AbsTokenizer
from espnet2.text.build_tokenizer import build_tokenizer
from espnet2.train.abs_espnet_model import AbsESPnetModel

from espnet_kv.encoder.chunked import KVEncoder
from espnet_kv.errors import ConfigError, UserError


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
        UserError: the sentencepiece model is missing or damaged.
    """
    token_type = token_type or args.token_type
    if token_type != "bpe":
        return build_tokenizer(token_type=token_type) if token_type else None
    bpemodel = bpemodel or args.bpemodel
    if bpemodel is None:
        return None
    if not Path(bpemodel).is_file():
        raise UserError(
            f"bpemodel {bpemodel} does not exist: put it beside config.yaml as bpe.model, or give "
            "--bpemodel"
        )
    tokenizer = build_tokenizer(token_type="bpe", bpemodel=bpemodel)
    try:
        tokenizer.tokens2text([])  # it reads its model at the first use
    except (RuntimeError, OSError) as error:
        raise UserError(f"bpemodel {bpemodel} is no sentencepiece model, or is damaged") from error
    return tokenizer
