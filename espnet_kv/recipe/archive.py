"""The zip of a packed model: made by ESPnet's packer, of files that are found from anywhere."""

import contextlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from espnet_kv.config import load_yaml
from espnet_kv.errors import UserError
from espnet_kv.espnet.register import CHOICES
from espnet_kv.names import NAMED, REMARK

OURS = {choice for choices in CHOICES.values() for choice in choices}


def pack(files: Mapping[str, Path], more: Iterable[Path], folder: Path, out: Path) -> None:
    """Pack a model with espnet2.bin.pack.

    It stores files that are outside of the working directory, or links to such, in a way in which
    they are not found again. So the files are put together under relative names first.

    Args:
        files: asr_train_config, asr_model_file and, with a language model, lm_train_config and
            lm_file. Files that the configurations name are packed, too.
        more: files and directories that are packed beside them.
        folder: does not exist, on the disk of the files; they are put together there.
        out: the zip.

    Raises:
        UserError: a file that a configuration names is gone.
    """
    from espnet2.bin.pack import main

    folder.mkdir()
    words = ["asr", "--outpath", str(out.absolute())]
    named: list[Path] = []
    for name, file in files.items():
        place = _place(file)
        if name.endswith("_config"):
            model = files[name.replace("train_config", "model_file").replace("lm_model_", "lm_")]
            named += _add_config(file, model, folder, place)
        else:
            _add(file, folder / place)
        words += [f"--{name}", str(place)]
    for file in more:
        named.append(_place(file))
        _add(file, folder / named[-1])
    for place in dict.fromkeys(named):
        words += ["--option", str(place)]
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        main(words)


def add_card(made: Path, out: Path, card: str) -> None:
    """Copy a pack, with README.md and with the remedy behind the names of our classes.

    Args:
        made: the pack. out: another path. card: the text of README.md.
    """
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(out, "w") as new:
        configs = set(yaml.safe_load(old.read("meta.yaml"))["yaml_files"].values())
        for info in old.infolist():
            if info.filename in configs:
                config = _with_remarks(yaml.safe_load(old.read(info)))
                new.writestr(info.filename, _dumped(config))
            elif info.filename != "README.md":
                with old.open(info) as source, new.open(info, "w") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
        new.writestr("README.md", card)


def _with_remarks(config: dict[str, Any]) -> dict[str, Any]:
    ours = [key for key in NAMED if config.get(key) in OURS]
    return config | {key: config[key] + REMARK for key in ours}


def _add_config(file: Path, model: Path, folder: Path, place: Path) -> list[Path]:
    """Add a config.yaml and the files that it names; their places."""
    from espnet_kv.espnet.loading import (
        STATISTICS,
        find_files,
        named_files,
        read_checkpoint,
        write_statistics,
    )

    config = load_yaml(file)
    found = find_files(file, config)
    places = []
    for key, name in named_files(config).items():
        if key not in found:
            if key == "bpemodel" or name != "none":
                raise UserError(
                    f"{file}: {key}: {name} is neither here nor below any directory that "
                    "holds the config: put it beside config.yaml"
                )
            continue
        places.append(_place(Path(name)))
        _add(Path(found[key]), folder / places[-1])
        config[key] = str(places[-1])
    conf = config.get("normalize_conf") or {}
    if config.get("normalize") and isinstance(conf.get("stats_file"), str):
        places.append(_place(Path(conf["stats_file"])))
        config["normalize_conf"] = {**conf, "stats_file": str(places[-1])}
        statistics = folder / places[-1]
        if "normalize_conf" in found:
            _add(Path(found["normalize_conf"]["stats_file"]), statistics)
        elif set(STATISTICS) <= set(checkpoint := read_checkpoint(model)):
            statistics.parent.mkdir(parents=True, exist_ok=True)
            write_statistics(statistics, checkpoint)
        else:
            raise UserError(f"{file}: stats_file: {conf['stats_file']} does not exist")
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text(_dumped(config), encoding="utf-8")
    return places


def _place(path: Path) -> Path:
    """Where a file is in a pack: as seen from here, or in a folder of the name of its own."""
    seen = Path(os.path.relpath(path))
    if ".." in seen.parts:
        seen = Path(path.absolute().parent.name or "files") / path.name
    # from_pretrained finds what a configuration names by its separator
    return seen if len(seen.parts) > 1 else Path("files") / seen


def _add(source: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, copy, dirs_exist_ok=True)
    elif not copy.exists():
        try:
            os.link(source.resolve(), copy)
        except OSError:  # of another disk, or one without links
            shutil.copyfile(source, copy)


def _dumped(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=1000)
