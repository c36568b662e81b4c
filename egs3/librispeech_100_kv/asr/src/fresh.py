"""Results that ESPnet3 would keep although what they were made from has changed."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from espnet_kv.files import write_text

RECORD = "made_from.yaml"


def renew_statistics(config: DictConfig) -> None:
    """Remove statistics of other data, another tokenizer or another frontend.

    Args:
        config: of the training.
    """
    made_from = {
        "dataset": _plain(config.dataset),
        "frontend": config.model.get("frontend"),
        "frontend_conf": _plain(config.model.get("frontend_conf")),
    }
    for name in ("train", "valid"):
        _renew(Path(config.stats_dir) / name, made_from)


def renew_results(config: DictConfig) -> None:
    """Remove results of another model or search, or of a test set that was different.

    Args:
        config: of the inference.
    """
    for test_set in config.dataset.test:
        made_from = {
            "model": _plain(config.model),
            "batch_size": config.get("batch_size"),
            "test_set": _plain(test_set),
        }
        _renew(Path(config.inference_dir) / test_set.name, made_from)


def _renew(directory: Path, made_from: dict[str, Any]) -> None:
    """Empty a directory whose record tells of something else, and write the record."""
    digests = {name: _digest(Path(name)) for name in _files(made_from)}
    text = yaml.safe_dump(made_from | {"sha256": digests})
    record = directory / RECORD
    if record.is_file() and record.read_text(encoding="utf-8") == text:
        return
    if directory.is_dir():
        print(f"  {directory} was made from something else: it is made again", flush=True)
        shutil.rmtree(directory)
    write_text(record, text)


def _files(value: Any) -> Iterator[str]:
    """Every string in nested dictionaries and lists that names a file."""
    if isinstance(value, str):
        if Path(value).is_file():
            yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for one in inner:
            yield from _files(one)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
