"""Weights and sizes of Whisper models: by name, from openai-whisper's files and CTranslate2's."""

import importlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from espnet_kv.errors import ConfigError, UserError, one_line
from espnet_kv.espnet.ctranslate2 import MODEL_FILE, read_model

# name -> state size, heads, layers (arXiv 2212.04356, table 1); each also with .en
SIZES = {
    "tiny": (384, 6, 4),
    "base": (512, 8, 6),
    "small": (768, 12, 12),
    "medium": (1024, 16, 24),
}
# name -> mel bins, vocabulary, layers of the decoder. ESPnet's fork has no large-v3, but `large`
LARGE = {
    "large": (80, 51865, 32),
    "large-v1": (80, 51865, 32),
    "large-v2": (80, 51865, 32),
    "large-v3": (128, 51866, 32),
    "large-v3-turbo": (128, 51866, 4),
    "turbo": (128, 51866, 4),
}
AUDIO_FRAMES, TEXT_TOKENS = 1500, 448  # positions of the encoder, and of the decoder

_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


def whisper_package() -> Any:
    """Import the package openai-whisper.

    Raises:
        UserError: it is not installed.
    """
    try:
        found = [importlib.import_module(f"whisper{part}") for part in ("", ".audio", ".tokenizer")]
    except ImportError as error:  # also for another package of this name
        raise UserError(
            f"openai-whisper is not installed ({error}): pip install 'espnet_kv[whisper]'"
        ) from error
    return found[0]


@contextmanager
def weights_follow() -> Iterator[None]:
    """Build Whisper models with random weights within the block: a checkpoint is loaded after it.

    The original weights are then neither needed nor downloaded.
    """
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def sizes_of(name: str) -> dict[str, int] | None:
    """The dimensions of a public model by openai-whisper's names; None: no such name."""
    if name in LARGE:
        (mels, vocabulary, blocks), (state, heads, layers) = LARGE[name], (1280, 20, 32)
    elif name.removesuffix(".en") in SIZES:
        state, heads, layers = SIZES[name.removesuffix(".en")]
        mels, vocabulary, blocks = 80, 51865 - name.endswith(".en"), layers
    else:
        return None
    return {
        "n_mels": mels,
        "n_audio_ctx": AUDIO_FRAMES,
        "n_audio_state": state,
        "n_audio_head": heads,
        "n_audio_layer": layers,
        "n_vocab": vocabulary,
        "n_text_ctx": TEXT_TOKENS,
        "n_text_state": state,
        "n_text_head": heads,
        "n_text_layer": blocks,
    }


def load_whisper(name: str | None, download_dir: str | None, dims: Mapping | None) -> Any:
    """Build openai-whisper's model.

    Args:
        name: a public name, openai-whisper's FILE.pt, or CTranslate2's model.bin or its directory;
            empty: random weights.
        download_dir: directory of downloads; None: openai-whisper's.
        dims: dimensions of the model; None: those of the name or of the file.

    Returns:
        A `whisper.model.Whisper` on the CPU.

    Raises:
        UserError: a file is missing or damaged, or a download failed.
        ConfigError: an unknown name, or other dims than those of the weights.
    """
    package = whisper_package()
    path = Path(name) if name else None
    if dims is not None:
        dims = _checked(dims)
    if not name or _weights_follow.get():
        dims = dims or (sizes_of(name) if name else None)
        if dims is None and path is not None and path.exists():
            dims = _read(path)[0]
        if dims is None:
            raise UserError(
                f"whisper_model: {name or None} does not tell the sizes of the model: give dims "
                f"({', '.join(_dimensions())}), or put the file there"
            )
        return package.model.Whisper(package.model.ModelDimensions(**dims))
    if path is not None and path.exists():
        found, state = _read(path)
        model = package.model.Whisper(package.model.ModelDimensions(**found))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{name} is no Whisper model: {one_line(error)}") from error
    elif sizes_of(name) is not None:
        model = _download(package, name, download_dir)
    else:
        raise ConfigError(
            f"whisper_model: {name!r} is no file and no name of a model (allowed: "
            f"{', '.join(SIZES)}, each also with .en; {', '.join(LARGE)}; a FILE.pt; a directory "
            f"with CTranslate2's {MODEL_FILE})"
        )
    if dims is not None and asdict(model.dims) != dims:
        raise ConfigError(f"dims: {dims} are not those of {name}: {asdict(model.dims)}")
    return model


def _dimensions() -> list[str]:
    return [field.name for field in fields(whisper_package().model.ModelDimensions)]


def _checked(dims: Any) -> dict[str, int]:
    names = _dimensions()
    if not isinstance(dims, Mapping) or set(dims) != set(names):
        raise ConfigError(f"dims: {dims!r} is no mapping of {', '.join(names)}")
    for key, value in dims.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"dims.{key}: {value!r} is not a whole number of 1 or more")
    return dict(dims)


def _download(package: Any, name: str, download_dir: str | None) -> Any:
    try:
        own = getattr(package.load_model, "own", package.load_model)  # see whisper_for_espnet
        return own(name, download_root=download_dir, device="cpu")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"whisper_model: {name} cannot be loaded ({one_line(error)}): put {name}.pt into "
            "download_dir, or name a file"
        ) from error


def _read(path: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Dimensions and state dict of a file."""
    if path.is_dir() or path.name == MODEL_FILE:
        return read_model(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _checked(state["dims"]), state["model_state_dict"]
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or no model of openai-whisper ({type(error).__name__}: "
            f"{one_line(error)}); copy it again"
        ) from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no model of openai-whisper: it lacks dims and model_state_dict"
        ) from error
