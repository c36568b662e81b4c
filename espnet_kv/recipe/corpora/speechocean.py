"""speechocean762 (OpenSLR 101): English sentences read by speakers of Mandarin.

It comes with Kaldi data directories `train` and `test`, whose audio paths are relative to their
parent folder.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.corpora.download import OPENSLR_URL, fetch_and_extract
from espnet_kv.recipe.datadir import DataDir

DEV_SPEAKERS = 20
_INSTEAD = "set OPENSLR_URL to a mirror, or give the folder of a copy that you have"


def download(into: Path) -> Path:
    """Download and extract the corpus once; return the folder with train and test."""
    base = os.environ.get("OPENSLR_URL") or OPENSLR_URL
    tree = into / "speechocean762"
    url = f"{base.rstrip('/')}/101/speechocean762.tar.gz"
    # OpenSLR publishes no checksum of this archive; gzip has its own checksum.
    fetch_and_extract(url, into, tree / ".complete", instead=_INSTEAD)
    return tree


def load_subset(root: Path, subset: str) -> DataDir:
    """Read `train`, `dev` or `test`.

    dev consists of DEV_SPEAKERS speakers of the training directory (at most half of them), evenly
    selected from their sorted ids; train consists of the others. No utterance is dropped here.

    Raises:
        UserError: as DataDir.read, `root` is not speechocean762, or it has a single speaker.
    """
    folder = root
    if not (folder / "train").is_dir() and (root / "speechocean762" / "train").is_dir():
        folder = root / "speechocean762"
    for name in ("train", "test"):
        if not (folder / name / "wav.scp").is_file():
            raise UserError(
                f"{folder / name / 'wav.scp'} is missing: give the folder of speechocean762, "
                "which holds train, test and WAVE"
            )
    data = DataDir.read(folder / ("test" if subset == "test" else "train"))
    if subset == "test":
        return data
    speakers = sorted(set(data.utt2spk.values()))
    if len(speakers) < 2:
        raise UserError(f"{folder / 'train'} has a single speaker, and dev needs one of its own")
    number = min(DEV_SPEAKERS, len(speakers) // 2)
    dev = {speakers[i * len(speakers) // number] for i in range(number)}
    in_dev = {utt for utt, speaker in data.utt2spk.items() if speaker in dev}
    wanted = subset == "dev"

    def part(table: Mapping[str, str]) -> dict[str, str]:
        return {utt: value for utt, value in table.items() if (utt in in_dev) is wanted}

    return DataDir(part(data.wav_scp), part(data.text), part(data.utt2spk))
