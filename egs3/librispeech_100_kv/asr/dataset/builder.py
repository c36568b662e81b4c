"""Manifests of the corpora: LibriSpeech-100, and mini AN4, which ESPnet ships, for a trial."""

import os
import re
import tarfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from espnet3.components.data import dataset_builder

from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, write_text

SETS = {
    "librispeech_100": ("train-clean-100", "dev-clean", "dev-other", "test-clean", "test-other"),
    "mini_an4": ("train", "valid", "test"),
}
"""Corpus -> its sets."""
Entry = tuple[str, Path, str]
"""Utterance, audio file, transcript."""


class DatasetBuilder(dataset_builder.DatasetBuilder):
    """Writes DATA_DIR/manifest/SET.tsv for every set of a corpus.

    The keys of `create_dataset` in the training configuration are the arguments of each method.

    Args (of each method):
        corpus: one of SETS.
        data_dir: where the manifests go.
        source_dir: a copy of LibriSpeech; None: the one that LIBRISPEECH names in the environment.
        **_: further keys of ESPnet3's default configuration.
    """

    def is_source_prepared(
        self, corpus: str, data_dir: str, source_dir: str | None = None, **_: Any
    ) -> bool:
        """Whether mini AN4 is unpacked, or nothing has to be."""
        if corpus == "mini_an4":
            return _source(data_dir).is_dir()
        return self.is_built(corpus, data_dir) or _librispeech(source_dir).is_dir()

    def prepare_source(self, corpus: str, data_dir: str, **_: Any) -> None:
        """Unpack mini AN4, which the installed ESPnet holds; LibriSpeech is read where it is."""
        archive = resources.files("egs3.mini_an4.esp2_asr") / "downloads.tar.gz"
        if not archive.is_file():
            raise UserError(f"{archive} does not exist: the installed ESPnet has no mini AN4")
        with (
            new_directory(_source(data_dir)) as partial,
            archive.open("rb") as file,
            tarfile.open(fileobj=file) as tar,
        ):
            tar.extractall(partial, filter="data")

    def is_built(self, corpus: str, data_dir: str, **_: Any) -> bool:
        """Whether all manifests are there."""
        if corpus not in SETS:
            raise UserError(f"corpus: {corpus} is unknown (allowed: {', '.join(SETS)})")
        return all(_manifest(data_dir, name).is_file() for name in SETS[corpus])

    def build(self, corpus: str, data_dir: str, source_dir: str | None = None, **_: Any) -> None:
        """Write the manifests.

        Raises:
            UserError: a set is missing, or an utterance has no audio or no transcript.
        """
        if corpus == "mini_an4":
            entries = _mini_an4(_source(data_dir) / "downloads/an4")
        else:
            root = _librispeech(source_dir)
            entries = {name: sorted(_read_librispeech(root / name)) for name in SETS[corpus]}
        for name, found in entries.items():
            for utterance, audio, _text in found:
                if not audio.is_file():
                    raise UserError(f"{name}: {utterance}: {audio} does not exist")
            lines = (f"{utterance}\t{audio}\t{text}\n" for utterance, audio, text in found)
            write_text(_manifest(data_dir, name), "".join(lines))
            print(f"  {name}: {len(found)} utterances", flush=True)


def _source(data_dir: str) -> Path:
    return Path(data_dir) / "source"


def _manifest(data_dir: str, name: str) -> Path:
    return Path(data_dir) / "manifest" / f"{name}.tsv"


def _librispeech(source_dir: str | None) -> Path:
    """The directory that holds the sets of LibriSpeech."""
    given = source_dir or os.environ.get("LIBRISPEECH")
    if not given:
        raise UserError(
            "LIBRISPEECH is not set: name the directory that holds train-clean-100, in the "
            "environment or as create_dataset.source_dir"
        )
    inner = Path(given) / "LibriSpeech"
    root = inner if inner.is_dir() else Path(given)
    missing = [name for name in SETS["librispeech_100"] if not (root / name).is_dir()]
    if missing:
        raise UserError(
            f"{root} lacks {', '.join(missing)}: unpack these sets of LibriSpeech there"
        )
    return root.resolve()


def _read_librispeech(folder: Path) -> Iterator[Entry]:
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if not transcripts:
        raise UserError(f"{folder} holds no *.trans.txt: unpack the set again")
    for file in transcripts:
        for line in file.read_text(encoding="utf-8").splitlines():
            utterance, _, text = line.partition(" ")
            if not text.strip():
                raise UserError(f"{file}: {utterance!r} has no transcript")
            yield utterance, file.parent / f"{utterance}.flac", text.strip()


def _mini_an4(folder: Path) -> dict[str, list[Entry]]:
    """ESPnet's sets: the first training utterance is left for validation."""
    found: dict[str, list[Entry]] = {}
    for name, place in (("train", "an4_clstk"), ("test", "an4test_clstk")):
        lines = (folder / f"etc/an4_{name}.transcription").read_text(encoding="utf-8")
        parsed = re.findall(r"^(?:<s> )?(.+?)(?: </s>)? \((\w+)-(\w+)-(\w+)\)$", lines, re.M)
        found[name] = sorted(
            (
                f"{speaker}-{number}-{end}",
                (folder / f"wav/{place}/{speaker}/{number}-{speaker}-{end}.sph").resolve(),
                text,
            )
            for text, number, speaker, end in parsed
        )
    return {"train": found["train"][1:], "valid": found["train"][:1], "test": found["test"]}
