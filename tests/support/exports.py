"""Exported graphs of small models."""

from pathlib import Path
from typing import Any

from small_models import build, write_scp

ATTENTIONS = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mla": {"kv_rank": 8},
    "linear": {"feature_map": "hedgehog", "decay": 0.9},
}
PAIRS = [
    *(("kv_conformer", attention) for attention in ATTENTIONS),
    ("kv_branchformer", "gqa"),
    ("kv_e_branchformer", "linear"),
    ("kv_transformer", "gqa"),
]
"""Encoders and attentions, each of them once at least."""
LETTERS = ("ABBAAB", "BBAABA", "BABAAB", "AABBA", "BAB", "ABAB")
"""Recordings of 60 chunks of 4 frames and more."""


def exported(
    folder: Path, encoder: str = "kv_conformer", attention: str = "mla", **options: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Export a model to folder/onnx; return the model, its arguments and the differences."""
    from espnet_kv.export.exporter import export, read_features

    conf = {"attention_type": attention, "attention_conf": ATTENTIONS[attention]}
    model, args = build(folder, encoder=encoder, encoder_conf=conf)
    features = read_features(model, write_scp(folder, LETTERS), "sound", len(LETTERS))
    (folder / "onnx").mkdir()
    return model, args, export(model, features, folder / "onnx", **options)
