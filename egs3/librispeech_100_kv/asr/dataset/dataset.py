"""Recordings and transcripts of a manifest."""

from pathlib import Path
from typing import Any

import soundfile
from espnet3.components.data.base_dataset import BaseDataset
from espnet3.contract import Field

from espnet_kv.errors import UserError


class Dataset(BaseDataset):
    """One set of a corpus.

    Args:
        manifest: its file, written by the create_dataset stage: utterance, audio file and
            transcript in every line, split by tabs.
        utt_ids: items name their utterance, so that results do; training takes arrays alone.

    Raises:
        UserError: the manifest is missing, or (for an item) its audio cannot be read.
    """

    fields = (Field("speech", "audio"), Field("text", "text"))

    def __init__(self, manifest: str, utt_ids: bool = False) -> None:
        if not Path(manifest).is_file():
            raise UserError(f"{manifest} does not exist: run the create_dataset stage")
        lines = Path(manifest).read_text(encoding="utf-8").splitlines()
        self._entries = [line.split("\t") for line in lines]
        self._utt_ids = utt_ids

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"speech": (N,) float32, "text"}, and "utt_id" where it is wished for."""
        utterance, audio, text = self._entries[int(index)]
        try:
            speech, _ = soundfile.read(audio, dtype="float32")
        except (OSError, soundfile.SoundFileError) as error:
            raise UserError(f"{utterance}: {audio} cannot be read: {error}") from error
        item = {"speech": speech, "text": text}
        return item | {"utt_id": utterance} if self._utt_ids else item
