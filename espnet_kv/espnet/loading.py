"""Reading trained models: config.yaml, checkpoints and tokenizers, strictly."""

import argparse
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from espnet_kv.config import plain_names
from espnet_kv.errors import ConfigError, UserError, is_out_of_memory, one_line

if TYPE_CHECKING:
    from espnet2.text.abs_tokenizer import AbsTokenizer
    from espnet2.train.abs_espnet_model import AbsESPnetModel

# keys of a checkpoint that hold the statistics of the features
STATISTICS = ("normalize.mean", "normalize.std")


def read_checkpoint(file: Path | str) -> dict[str, Tensor]:
    """The parameters and buffers in a model file, on the CPU; code in it is never run.

    Files of torch before 1.6, which are no zip files, are read too.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """
    path = Path(file)
    if not path.exists():
        raise UserError(f"{file} does not exist")
    if path.is_dir():
        raise UserError(f"{file} is no model file but a directory: name a file in it")
    if not path.stat().st_size:
        raise UserError(f"{file} is no model file: it is empty; copy or train it again")
    with path.open("rb"):  # what the system says is said here; below, anything means damage
        pass
    try:
        # a zip file need not be read where only the shapes are of interest
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:  # damaged bytes lead an unpickler anywhere
        if is_out_of_memory(error):
            raise
        raise _damaged(file, error) from error
    for wrapper in ("module", "state_dict"):  # of DeepSpeed and Lightning
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise UserError(f"{file} is no model file: it holds a {type(state).__name__}")
    if isinstance(state.get("model"), Mapping) and "optimizers" in state:
        raise UserError(
            f"{file} is the state of a training, no model file: name a model beside it, e.g. "
            "valid.acc.ave.pth"
        )
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is no model file: it holds other things than named parameters")
    return dict(state)


def _damaged(file: Path | str, error: Exception) -> UserError:
    first = next(iter(str(error).splitlines()), "").split(". ")[0].strip()
    return UserError(
        f"{file} is no model file, or it is damaged ({type(error).__name__}: {one_line(first)}): "
        "copy or train it again"
    )


def check_finite(model: nn.Module, file: Path | str) -> None:
    """Refuse a model that holds what is no number.

    Raises:
        UserError: names the file and the first such parameter or buffer.
    """
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
            raise UserError(
                f"{file}: {key} holds NaN: the training diverged; use the model of an earlier "
                "epoch, or train again with a lower learning rate"
            )
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{file}: {key} holds infinity: the training diverged; train again")


class LoadGuard:
    """Makes every `load_state_dict` of a module strict, also where the caller asks for less.

    It judges the keys of that module alone: what else a load lacks is the business of others.

    Args:
        module: guarded from now on.
    """

    def __init__(self, module: nn.Module):
        self._prefix = ""
        self._hooks = [
            module.register_load_state_dict_pre_hook(self._before),
            module.register_load_state_dict_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the guard off."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._prefix = prefix  # of the module's keys in what is loaded

    def _after(self, module: nn.Module, keys: Any) -> None:
        missing, unexpected = (
            [key for key in listed if key.startswith(self._prefix)]
            for listed in (keys.missing_keys, keys.unexpected_keys)
        )
        if missing or unexpected:
            raise UserError(
                f"the checkpoint does not fit {type(module).__name__} (is it from another "
                f"attention_type or config?): missing keys: {', '.join(missing) or 'none'}; "
                f"unexpected keys: {', '.join(unexpected) or 'none'}"
            )


def refuse_partial_loads(module: nn.Module) -> LoadGuard:
    """Guard a module's loads.

    ESPnet loads trained models with strict=False: a checkpoint of another attention would leave
    random weights behind without a word.

    Returns:
        The guard, whose remove() takes the refusal back.

    Raises:
        UserError: (when loading) one message that lists missing and unexpected keys.
    """
    return LoadGuard(module)


def read_config(
    file: Path | str, keys: Sequence[str] = ("encoder", "token_list")
) -> dict[str, Any]:
    """The mapping in a config.yaml.

    Args:
        keys: that it has to have, as those of a model of that kind.

    Raises:
        UserError: it is missing or none.
    """
    if not Path(file).exists():
        raise UserError(f"{file} does not exist")
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except IsADirectoryError as error:
        raise UserError(f"{file} is no config.yaml but a directory: name the file") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(
            f"{file} is no config.yaml of a trained model: {one_line(error)}"
        ) from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise UserError(f"{file} is no config.yaml of a trained model: it holds no keys")
    for key in keys:
        if not config.get(key):
            raise UserError(f"{file} is no config.yaml of a trained model: it names no {key}")
    return plain_names(config)


def find_files(config_file: Path | str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.yaml that name files, with paths that exist from here.

    ESPnet writes paths relative to the directory of the recipe. A path that is found nowhere is
    left out.
    """
    found: dict[str, Any] = {}
    for key in ("token_list", "bpemodel", "non_linguistic_symbols"):
        name = config.get(key)
        if isinstance(name, str) and (path := find_file(config_file, name)) is not None:
            found[key] = str(path)
    normalize = config.get("normalize_conf") or {}
    if config.get("normalize") and isinstance(name := normalize.get("stats_file"), str):
        path = find_file(config_file, name)
        if path is not None:
            found["normalize_conf"] = {**normalize, "stats_file": str(path)}
    return found


def find_file(config_file: Path | str, name: str) -> Path | None:
    """A file that a config.yaml names: beside it, below a directory that holds it, or here."""
    beside = Path(config_file).parent
    tries = [beside / Path(name).name]
    if Path(name).suffix == ".model":
        tries.append(beside / "bpe.model")  # as a conversion and the recipe call it
    tries += [root / name for root in Path(config_file).resolve().parents]
    return next((path for path in [*tries, Path(name)] if path.is_file()), None)


def build_filled(
    build: Any, args: argparse.Namespace, checkpoint: Mapping[str, Tensor], config_file: Path | str
) -> "AbsESPnetModel":
    """build(args) for a checkpoint, from which GlobalMVN gets its statistics, not from its file.

    The file may be gone, or of a model with another front end.

    Args:
        build: of a task, e.g. ASRTask.build_model.
        config_file: where args come from, for messages.

    Raises:
        UserError: the arguments build no model, or name a file that does not exist.
    """
    conf = getattr(args, "normalize_conf", None)
    try:
        if args.normalize != "global_mvn" or not set(STATISTICS) <= set(checkpoint):
            return build(args)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "feats_stats.npz"
            write_statistics(file, checkpoint)
            args.normalize_conf = {**(conf or {}), "stats_file": str(file)}
            return build(args)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} does not exist, but {config_file} names it: put it there, or beside "
            "config.yaml"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}") from error
    except (UserError, OSError):
        raise
    except Exception as error:  # what ESPnet's classes say of arguments that they cannot use
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{config_file} builds no model: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        if conf is not None:
            args.normalize_conf = conf


def write_statistics(file: Path | BinaryIO, checkpoint: Mapping[str, Tensor]) -> None:
    """Write the statistics of features that a checkpoint holds as a feats_stats.npz."""
    mean, std = (checkpoint[key].double().numpy() for key in STATISTICS)
    # of the type that it has there, which is the one that the model's buffers get
    dtype = np.float64 if checkpoint[STATISTICS[0]].dtype == torch.float64 else np.float32
    np.savez(file, count=1, sum=mean.astype(dtype), sum_square=(std**2 + mean**2).astype(dtype))


def load_tokenizer(
    args: argparse.Namespace, token_type: str | None = None, bpemodel: str | None = None
) -> "AbsTokenizer | None":
    """What turns tokens into text, as ESPnet's inference chooses it; None: nothing does.

    Args:
        args: the training configuration, for what is None.

    Raises:
        UserError: the sentencepiece model is missing or damaged.
    """
    from espnet2.text.build_tokenizer import build_tokenizer

    token_type = token_type or args.token_type
    if token_type != "bpe":
        return build_tokenizer(token_type=token_type) if token_type else None
    bpemodel = bpemodel or args.bpemodel
    if bpemodel is None:
        return None
    if not Path(bpemodel).is_file():
        raise UserError(
            f"bpemodel {bpemodel} does not exist: put it beside config.yaml as bpe.model, or give "
            "bpemodel"
        )
    tokenizer = build_tokenizer(token_type="bpe", bpemodel=bpemodel)
    try:
        tokenizer.tokens2text([])  # it reads its model at the first use
    except (RuntimeError, OSError) as error:
        raise UserError(f"bpemodel {bpemodel} is no sentencepiece model, or is damaged") from error
    return tokenizer
