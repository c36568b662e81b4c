"""Training configurations: a YAML of conf/ and an overlay that replaces some of its keys."""

import itertools
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from espnet_kv.errors import UserError, one_line
from espnet_kv.names import plain_names


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing or is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a YAML file: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON mapping beside a model; empty if the file does not exist.

    Raises:
        UserError: the file is damaged.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({one_line(error)}): remove it, or make it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: expected keys and values")
    return content


def load_config(path: Path, overlay: Path | None = None) -> dict[str, Any]:
    """A training configuration with the keys of the overlay.

    An overlay is a YAML of the same keys. The key `per_encoder` holds keys for one encoder only:
    `per_encoder: {kv_conformer: {encoder_conf: ...}}`.

    Raises:
        UserError: a file is missing or is not a YAML mapping, or `per_encoder` is not a mapping.
    """
    config = plain_names(load_yaml(path))
    if overlay is None:
        return config
    extra = load_yaml(overlay)
    per_encoder = extra.pop("per_encoder", {})
    if not isinstance(per_encoder, dict) or not all(
        isinstance(keys, dict) for keys in per_encoder.values()
    ):
        raise UserError(f"{overlay}: per_encoder must map encoders to keys")
    config = _merged(config, extra)
    return _merged(config, per_encoder.get(config.get("encoder"), {}))


# keys of a training configuration that affect the feature statistics
FRONT_END = (
    "frontend",
    "frontend_conf",
    "input_size",
    "preprocessor",
    "preprocessor_conf",
    "speech_volume_normalize",
    "rir_scp",
    "rir_apply_prob",
    "noise_scp",
    "noise_apply_prob",
    "noise_db_range",
    "short_noise_thres",
    "aux_ctc_tasks",
)


def front_end(config: Mapping[str, Any], more: str) -> dict[str, Any]:
    """The keys of a configuration, and of the options `more`, that affect the statistics."""
    found = {key: config[key] for key in FRONT_END if config.get(key) is not None}
    words = [part for word in shlex.split(more) for part in word.split("=", 1)]
    for n, word in enumerate(words):
        key = word.removeprefix("--")
        if word.startswith("--") and key in FRONT_END:
            values = itertools.takewhile(lambda value: not value.startswith("--"), words[n + 1 :])
            found.setdefault("options", {}).setdefault(key, []).extend(values)
    return found


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _merged(base[key], value)
        merged[key] = value
    return merged
