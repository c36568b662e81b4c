"""Packed models: a zip of espnet2.bin.pack, or a tag that espnet_model_zoo knows."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from espnet_kv.errors import UserError, one_line
from espnet_kv.files import locked, write_text

NEEDED = ("asr_train_config", "asr_model_file")
"""What the pack of a recognizer holds, by the names of ESPnet's arguments."""
RECORD = ".unpacked.json"
"""Written last into a directory of the cache: the files of the pack, relative to it."""


def unpacked(model_tag: str) -> dict[str, str]:
    """The files of a packed model, unpacked or downloaded once into espnet_model_zoo's cache.

    Args:
        model_tag: path of a zip, or a tag such as espnet/NAME.

    Returns:
        Name of an argument of ESPnet's Speech2Text (asr_train_config, asr_model_file and, where
        the pack has a language model, lm_train_config, lm_file) -> path.

    Raises:
        UserError: there is no such file or tag, no network, or the pack is damaged or of another
            kind.
    """
    path = Path(model_tag).expanduser()
    if path.exists() or (path.suffix in (".zip", ".pth", ".yaml") and "://" not in model_tag):
        return _of_zip(path)
    return _checked(model_tag, _of_tag(model_tag))


def _of_zip(file: Path) -> dict[str, str]:
    if not file.exists():
        raise UserError(f"{file} does not exist: give the zip of a packed model, or a model tag")
    if file.is_dir():
        raise UserError(f"{file} is a directory: give the zip of a packed model, or a model tag")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = Path.home() / ".cache/espnet_model_zoo/espnet_kv" / digest[:32]
    with locked(folder, f"unpacking {file}", wait=True):
        if not (folder / RECORD).exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            try:
                _unpack(file, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return {name: str(folder / path) for name, path in files.items()}


def _unpack(file: Path, folder: Path) -> None:
    from espnet2.main_funcs.pack_funcs import UnsafeArchiveMemberError, unpack

    folder.mkdir(parents=True)
    again = "copy it again, or pack the model again"
    try:
        with zipfile.ZipFile(file) as pack:
            if "meta.yaml" not in pack.namelist():
                raise UserError(f"{file} is no packed model: it has no meta.yaml; {again}")
            if (broken := pack.testzip()) is not None:
                raise UserError(f"{file} is damaged: {broken} in it cannot be read; {again}")
        # ESPnet goes by the name
        with_suffix = folder / "pack.zip"
        with_suffix.symlink_to(file.resolve())
        files = unpack(with_suffix, folder, use_cache=False)
        with_suffix.unlink()
    except UnsafeArchiveMemberError as error:
        raise UserError(f"{file} is no packed model: {one_line(error)}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UserError(
            f"{file} is no zip file, or it is damaged ({one_line(error)}): {again}"
        ) from error
    except (yaml.YAMLError, LookupError, TypeError, AssertionError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} is no packed model: its meta.yaml is damaged ({one_line(error)}); {again}"
        ) from error
    relative = {name: str(Path(path).relative_to(folder)) for name, path in files.items()}
    _checked(str(file), files)
    write_text(folder / RECORD, json.dumps(relative))


def _of_tag(tag: str) -> dict[str, str]:
    from espnet_model_zoo.downloader import ModelDownloader
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ModelDownloader().download_and_unpack(tag)
    except HFValidationError as error:
        raise UserError(
            f"{tag} is neither a file nor a model tag, such as espnet/NAME or the address of a zip"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{tag}: {constants.ENDPOINT} has no such model, or it is not public: check the name, "
            "or log in (hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise _not_fetched(tag, error.__cause__ or error) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise  # of the disk
        raise _not_fetched(tag, error) from error
    except (zipfile.BadZipFile, yaml.YAMLError, LookupError, TypeError) as error:
        raise UserError(f"{tag} is no packed model, or it is damaged: {one_line(error)}") from error
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"{tag} is no packed model: {one_line(error)}") from error


def _not_fetched(tag: str, error: BaseException) -> UserError:
    return UserError(
        f"{tag} cannot be fetched ({one_line(error)}): check the network, or give the path of a zip"
    )


def _checked(pack: str, files: Mapping[str, str]) -> dict[str, str]:
    """The files of a pack of a recognizer, all of which are there."""
    if missing := [name for name in NEEDED if name not in files]:
        raise UserError(
            f"{pack} holds no speech recognition model of ESPnet2: its meta.yaml names no "
            f"{missing[0]}, but {', '.join(files) or 'nothing'}"
        )
    for name, path in files.items():
        if not Path(path).is_file():
            raise UserError(
                f"{pack} is damaged: it has no {path}, which its meta.yaml calls {name}"
            )
    return dict(files)
