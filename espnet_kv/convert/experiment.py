"""Writes a converted model as an ESPnet experiment directory, with its provenance."""

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import espnet_kv
from espnet_kv.convert.model import Conversion
from espnet_kv.convert.record import FILE, SCHEMA, write_pages
from espnet_kv.errors import ArgumentError
from espnet_kv.espnet.loading import named_files, write_statistics
from espnet_kv.espnet.task import ASRTask
from espnet_kv.files import check_writable, commit, new_directory

# keys of a config.yaml that describe one training run: its directory, start and processes
RUN_KEYS = ("config", "output_dir", "init_param", "local_rank", "dist_rank", "dist_world_size")


def check_new(directory: Path, source: Path | None = None) -> None:
    """Check before the conversion that `directory` can be written and nothing is overwritten.

    Args:
        directory: the experiment directory to write.
        source: the experiment that is converted.

    Raises:
        UserError: `directory` is the source, a file, or not empty; or it cannot be created; or
            its name contains a colon.
    """
    if source is not None and directory.resolve() == source.resolve():
        raise ArgumentError(
            "output_dir", f"{directory} is the model that is converted: name another"
        )
    if ":" in str(directory):
        raise ArgumentError(
            "output_dir",
            f"{directory}: ESPnet's init_param, which fine-tuning uses, splits paths at a colon; "
            "name another directory",
        )
    check_writable(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ArgumentError("output_dir", f"{directory} exists: remove it, or name another one")


def write_experiment(
    directory: Path, model_name: str, conversion: Conversion, provenance: Mapping[str, Any]
) -> None:
    """Write config.yaml, the checkpoint, files they refer to, train.yaml and the report.

    The directory appears only when it is complete.

    Args:
        directory: new or empty. Paths in its files are relative if it is relative.
        model_name: file name of the checkpoint.
        provenance: result of `describe`.
    """
    with new_directory(directory) as new:
        config = dict(conversion.config) | {"output_dir": str(directory)}
        normalize = config.get("normalize_conf") or {}
        if config.get("normalize") and "stats_file" in normalize:
            name = "feats_stats" + Path(normalize["stats_file"]).suffix
            _write_statistics(Path(normalize["stats_file"]), conversion.model, new / name)
            config["normalize_conf"] = {**normalize, "stats_file": str(directory / name)}
        if bpe := named_files(config).get("bpemodel"):
            shutil.copyfile(bpe, new / "bpe.model")
            config["bpemodel"] = str(directory / "bpe.model")
        with (new / model_name).open("wb") as file:  # torch hides the reason of a failure
            torch.save(conversion.model.state_dict(), file)
        _dump(new / "config.yaml", config)
        _dump(new / "train.yaml", training_config(config, directory / model_name))
        record = {
            "schema": SCHEMA,
            **provenance,
            "parameters": conversion.parameters,
            "cache": conversion.cache,
            "choices": conversion.choices,
            "layers": [dataclasses.asdict(layer) for layer in conversion.layers],
        }
        (new / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_pages(new, record, directory.name)


def training_config(config: Mapping[str, Any], model_file: Path | None = None) -> dict[str, Any]:
    """The configuration for `asr_train --config` to train as in `config`, or fine-tune a model."""
    known = {action.dest for action in ASRTask.get_parser()._actions} - set(RUN_KEYS)
    kept = {key: value for key, value in config.items() if key in known}
    return kept | ({"init_param": [str(model_file)]} if model_file else {})


def describe(
    config_file: Path,
    model_file: Path,
    options: Mapping[str, Any],
    command: str,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Provenance of a conversion: source files and their hashes, options, command, versions."""
    return {
        "source": {
            "experiment": str(config_file.parent),
            "config": str(config_file),
            "config_sha256": sha256(config_file),
            "model_file": str(model_file),
            "model_sha256": sha256(model_file),
        },
        "options": dict(options),
        "command": command,
        "calibration": None if calibration is None else dict(calibration),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "espnet": metadata.version("espnet"),
            "espnet_kv": espnet_kv.__version__,
        },
    }


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_statistics(source: Path, model: Any, file: Path) -> None:
    """Copy the feature statistics; if their file is missing, take them from the model."""
    if source.is_file():
        shutil.copyfile(source, file)
        return
    with file.open("wb") as stream:  # np.savez adds .npz to a path of another suffix
        write_statistics(stream, model.state_dict())


def _dump(file: Path, config: Mapping[str, Any]) -> None:
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
