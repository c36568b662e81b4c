"""Exported graphs of small models."""

from pathlib import Path
from typing import Any, NamedTuple

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


class Exported(NamedTuple):
    """A model, its arguments, its graph in fp32, and the differences of its graphs."""

    model: Any
    args: Any
    graph: Path
    found: dict[str, Any]


def exported(
    folder: Path, encoder: str = "kv_conformer", attention: str = "mla", **options: Any
) -> Exported:
    """Export a model to folder/onnx."""
    from espnet_kv.export.exporter import export, read_recordings

    conf = {"attention_type": attention, "attention_conf": ATTENTIONS[attention]}
    model, args = build(folder, encoder=encoder, encoder_conf=conf)
    letters = LETTERS[:2] if options.get("chunk_size") == 1 else LETTERS
    recordings = read_recordings(model, write_scp(folder, letters), "sound", len(letters))
    (folder / "onnx").mkdir()
    found = export(model, recordings, folder / "onnx", **options)
    return Exported(model, args, folder / "onnx/model.onnx", found)
