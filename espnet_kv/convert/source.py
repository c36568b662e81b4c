"""Trained models that can be converted, loaded as kv_* models with mha.

What a stock ESPnet model and ours share is everything but attention, and with mha that too: a
stock config becomes ours by the names of encoder and decoder, and its checkpoint fills the model
key for key.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from espnet_kv.attention.mha import MultiHeadAttention
from espnet_kv.errors import UserError
from espnet_kv.streaming.load import load_model
from espnet_kv.task import ASRTask

ENCODERS = ("conformer", "branchformer", "e_branchformer", "transformer")
DECODER = "transformer"


@dataclass(frozen=True)
class Part:
    """A kind of attention in a model.

    module: encoder or decoder. prefix: of its keys in encoder_conf or decoder_conf.
    """

    module: str
    prefix: str = ""

    @property
    def type_key(self) -> str:
        return f"{self.prefix}attention_type"

    @property
    def conf_key(self) -> str:
        return f"{self.prefix}attention_conf"

    def slots(self, model: nn.Module) -> list[tuple[str, nn.Module, str]]:
        """(name, block, attribute) of the attention of every block; no attention, no entry."""
        module: Any = getattr(model, self.module)
        blocks = module.encoders if self.module == "encoder" else module.decoders
        slot = module.attention_slot if self.module == "encoder" else f"{self.prefix}attn"
        within = "encoders" if self.module == "encoder" else "decoders"
        return [
            (f"{self.module}.{within}.{n}.{slot}", block, slot)
            for n, block in enumerate(blocks)
            if getattr(block, slot) is not None
        ]

    def attentions(self, model: nn.Module) -> dict[str, Any]:
        """Name -> attention module, in the order of the blocks."""
        return {name: getattr(block, slot) for name, block, slot in self.slots(model)}


PARTS = {
    "encoder": Part("encoder"),
    "decoder_self": Part("decoder", "self_"),
    "decoder_cross": Part("decoder", "src_"),
}


def load_source(
    config_file: Path, model_file: Path, parts: tuple[str, ...]
) -> tuple[Any, dict[str, Any]]:
    """Load a model whose `parts` are to be converted.

    Encoder and decoder keep the names that they have where nothing of them is converted.

    Args:
        config_file: config.yaml of an ESPnet experiment.
        model_file: its checkpoint; loaded strictly.
        parts: keys of PARTS.

    Returns:
        The model in eval mode, in which these parts are MultiHeadAttention, and its
        configuration: that of the file with kv_ names and with paths that exist from here.

    Raises:
        UserError: a file cannot be used, or a part of the model cannot be converted.
    """
    config = read_config(config_file)
    changes = _kv_names(config_file, config, parts) | _reachable_paths(config_file, config)

    class SourceTask(ASRTask):
        @classmethod
        def build_model(cls, args: argparse.Namespace):
            vars(args).update(changes)
            return super().build_model(args)

    model: Any
    model, _ = load_model(config_file, model_file, task=SourceTask)
    model.eval()
    for name in parts:
        _check_attention(config_file, config, name, model)
    return model, config | changes


def read_config(file: Path) -> dict[str, Any]:
    """The mapping in a config.yaml.

    Raises:
        UserError: it is missing or none.
    """
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not isinstance(config.get("encoder"), str):
        raise UserError(f"{file} is no config.yaml of a trained model: it names no encoder")
    return config


def _kv_names(file: Path, config: dict[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
    """The choices that our classes go by, for what is converted."""
    if config.get("use_adapter"):
        raise UserError(
            f"{file}: use_adapter: true: the checkpoint holds adapters, not the model; merge them "
            "into it before the conversion"
        )
    changes = {}
    for name in parts:
        key = PARTS[name].module
        choice = str(config.get(key))
        stock = choice.removeprefix("kv_")
        allowed = ENCODERS if key == "encoder" else (DECODER,)
        if stock not in allowed:
            raise UserError(
                f"{file}: {key}: {choice} cannot be converted (allowed: {', '.join(allowed)}, and "
                "these with kv_ before them)"
            )
        changes[key] = f"kv_{stock}"
    return changes


def _reachable_paths(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Paths that ESPnet wrote relative to the directory of the recipe, as seen from here."""
    changes: dict[str, Any] = {}
    if isinstance(config.get("token_list"), str):
        tokens = Path(_reachable(file, "token_list", config["token_list"]))
        changes["token_list"] = tokens.read_text(encoding="utf-8").splitlines()
    if config.get("bpemodel"):
        changes["bpemodel"] = _reachable(file, "bpemodel", config["bpemodel"])
    normalize = config.get("normalize_conf") or {}
    if config.get("normalize") and "stats_file" in normalize:
        stats = _reachable(file, "normalize_conf.stats_file", normalize["stats_file"])
        changes["normalize_conf"] = {**normalize, "stats_file": stats}
    return changes


def _reachable(file: Path, key: str, name: str) -> str:
    for root in (Path(), *file.resolve().parents):
        if (root / name).is_file():
            return str(root / name)
    raise UserError(
        f"{file}: {key}: {name} is neither here nor below any directory that holds the config: "
        "run in the directory where the model was trained"
    )


def _check_attention(file: Path, config: dict[str, Any], name: str, model: Any) -> None:
    part = PARTS[name]
    conf = config.get(f"{part.module}_conf") or {}
    where = f"{file}: {part.module}_conf"
    if getattr(model, part.module) is None:
        raise UserError(f"{file}: model_conf.ctc_weight: 1.0 trained no decoder")
    if not getattr(getattr(model, part.module), "holds_our_attention", True):
        key = model.encoder.layer_type_key
        if "legacy" in (kind := model.encoder.espnet_conf["rel_pos_type"]):
            raise UserError(
                f"{where}.rel_pos_type: {kind}: legacy relative positions give the frames after a "
                "query the position scores of another query, which no other attention can; only "
                "models trained with rel_pos_type: latest (or with selfattn) can be converted"
            )
        raise UserError(
            f"{where}.{key}: {conf[key]} is no softmax attention over keys and values; only "
            "rel_selfattn and selfattn can be converted"
        )
    attentions = part.attentions(model)
    if not attentions:
        raise UserError(f"{where}: no block of it has attention")
    for attention in attentions.values():
        if not isinstance(attention, MultiHeadAttention):
            raise UserError(
                f"{where}.{part.type_key}: {conf.get(part.type_key)}: only mha can be converted"
            )
