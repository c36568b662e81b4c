"""Loads trained models for conversion as kv_* models with multi-head attention.

With mha, kv_* classes have the same parameters as ESPnet's own classes. So only the names of
encoder and decoder in the configuration change, and the checkpoint is loaded as it is.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.errors import UserError
from espnet_kv.espnet.loading import find_files, named_files, read_config
from espnet_kv.espnet.task import ASRTask
from espnet_kv.files import read_text

ENCODERS = ("conformer", "branchformer", "e_branchformer", "transformer", "whisper")
DECODERS = ("transformer", "whisper")
# attributes of the blocks of Whisper models, by the prefix of a part
WHISPER_SLOTS = {"": "attn", "self_": "attn", "src_": "cross_attn"}


@dataclass(frozen=True)
class Part:
    """One kind of attention in a model.

    module: encoder or decoder.
    prefix: of its keys in encoder_conf or decoder_conf.
    """

    module: str
    prefix: str = ""

    @property
    def type_key(self) -> str:
        return f"{self.prefix}attention_type"

    @property
    def conf_key(self) -> str:
        return f"{self.prefix}attention_conf"

    @property
    def is_cross(self) -> bool:
        """Whether the layers read the same frames, those of the encoder output."""
        return self.prefix == "src_"

    def slots(self, model: nn.Module) -> list[tuple[str, nn.Module, str]]:
        """(module name, block, attribute of the block) for every block that has this attention."""
        module: Any = getattr(model, self.module)
        within = f"{self.module}.{self.module}s"
        if hasattr(getattr(module, f"{self.module}s"), "blocks"):
            slot, within = WHISPER_SLOTS[self.prefix], f"{within}.blocks"
        else:
            slot = module.attention_slot if self.module == "encoder" else f"{self.prefix}attn"
        return [
            (f"{within}.{n}.{slot}", block, slot)
            for n, block in enumerate(self.blocks(model))
            if getattr(block, slot) is not None
        ]

    def blocks(self, model: nn.Module) -> Any:
        """The blocks of the encoder or decoder."""
        found = getattr(getattr(model, self.module), f"{self.module}s")
        return getattr(found, "blocks", found)

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
    """Load a model for the conversion of `parts`.

    An encoder or decoder without a part to convert keeps its class.

    Args:
        config_file: config.yaml of an ESPnet experiment.
        model_file: its checkpoint, loaded strictly (no missing or unexpected keys).
        parts: keys of PARTS.

    Returns:
        The model in eval mode, with MultiHeadAttention in these parts, and its configuration,
        with kv_* names and with paths that are valid in the current directory.

    Raises:
        UserError: a file cannot be used, or a part of the model cannot be converted.
    """
    config = read_config(config_file)
    names = _kv_names(config_file, config, parts)
    changes = names | find_files(config_file, config)
    if (bpe := named_files(config).get("bpemodel")) and "bpemodel" not in changes:
        raise UserError(
            f"{config_file}: bpemodel: {bpe} was found neither here nor relative to a directory "
            "above the config: put it beside config.yaml as bpe.model"
        )
    if isinstance(tokens := changes.get("token_list"), str):
        changes["token_list"] = read_text(tokens).splitlines()

    class SourceTask(ASRTask):
        @classmethod
        def build_model(cls, args: argparse.Namespace):
            vars(args).update(names)
            return super().build_model(args)

    model: Any
    model, _ = SourceTask.build_model_from_file(config_file, model_file)
    model.eval()
    for name in parts:
        _check_attention(config_file, config, name, model)
    return model, config | changes


def _kv_names(file: Path, config: dict[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
    """The kv_* names of the encoder and decoder that contain `parts`."""
    if config.get("use_adapter"):
        raise UserError(
            f"{file}: use_adapter: true: the checkpoint contains adapters only; merge them into "
            "the model before the conversion"
        )
    changes = {}
    for name in parts:
        key = PARTS[name].module
        choice = str(config.get(key))
        stock = choice.removeprefix("kv_")
        allowed = ENCODERS if key == "encoder" else DECODERS
        if stock not in allowed:
            raise UserError(
                f"{file}: {key}: {choice} cannot be converted (allowed: {', '.join(allowed)}, "
                "also with the prefix kv_)"
            )
        changes[key] = f"kv_{stock}"
    return changes


def _check_attention(file: Path, config: dict[str, Any], name: str, model: Any) -> None:
    part = PARTS[name]
    conf = config.get(f"{part.module}_conf") or {}
    where = f"{file}: {part.module}_conf"
    if getattr(model, part.module) is None:
        raise UserError(f"{file}: model_conf.ctc_weight: 1.0: the model has no decoder")
    if not getattr(getattr(model, part.module), "holds_our_attention", True):
        key = model.encoder.layer_type_key
        if "legacy" in (kind := model.encoder.espnet_conf["rel_pos_type"]):
            raise UserError(
                f"{where}.rel_pos_type: {kind}: legacy relative positions use the position scores "
                "of another query for frames after a query, which other attention types cannot; "
                "only models trained with rel_pos_type: latest (or with selfattn) can be converted"
            )
        raise UserError(
            f"{where}.{key}: {conf[key]} is not softmax attention over keys and values; only "
            "rel_selfattn and selfattn can be converted"
        )
    attentions = part.attentions(model)
    if not attentions:
        raise UserError(f"{where}: no block has attention")
    for attention in attentions.values():
        if not isinstance(attention, MultiHeadAttention):
            raise UserError(
                f"{where}.{part.type_key}: {conf.get(part.type_key)}: only mha can be converted"
            )
