"""Text that the tokenizer is trained on."""

from pathlib import Path

from espnet_kv.errors import UserError


def training_text(manifest: str) -> list[str]:
    """The transcripts of a manifest that the create_dataset stage wrote."""
    if not Path(manifest).is_file():
        raise UserError(f"{manifest} does not exist: run the create_dataset stage")
    lines = Path(manifest).read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[2] for line in lines]
