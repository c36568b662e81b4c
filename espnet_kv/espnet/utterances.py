"""Reading of utterances for the decoding commands."""

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espnet_kv.errors import ArgumentError, UserError, one_line
from espnet_kv.espnet.openai_whisper import HOP, WINDOW, uses_whisper
from espnet_kv.streaming.recordings import (
    entry_kind,
    model_rate,
    read_lines,
    read_recording,
    read_scp,
    read_utterance,
)

# types of --data_path_and_name_and_type that hold recordings
AUDIO = ("sound", "kaldi_ark")


def decoding_task(task: Any) -> Any:
    """Subclass an ESPnet task with our reading of audio in `build_streaming_iterator`.

    Audio of another sampling rate is resampled, with a note. Channels are mixed unless the model
    takes several. Unreadable data is a UserError that names utterance and file.

    Args:
        task: the ESPnet task.
    """

    class DecodingTask(task):
        @classmethod
        def build_preprocess_fn(cls, args: argparse.Namespace, train: bool) -> Any:
            return ReadAudio(args, super().build_preprocess_fn(args, train))

        @classmethod
        def build_streaming_iterator(
            cls,
            data_path_and_name_and_type: Sequence[tuple[str, str, str]],
            *,
            preprocess_fn: "ReadAudio",
            key_file: str | None = None,
            dtype: str = "float32",
            **options: Any,
        ) -> "Utterances":
            data = list(data_path_and_name_and_type)
            keys = _check(data, key_file)
            preprocess_fn.kinds = {name: kind for _, name, kind in data if kind in AUDIO}
            # recordings are passed as text entries to `preprocess_fn`, which reads them
            texts = [(path, name, "text" if kind in AUDIO else kind) for path, name, kind in data]
            if dtype in ("float16", "bfloat16"):
                dtype = "float32"  # features are computed in 32 bits
            loader = super().build_streaming_iterator(
                texts, preprocess_fn=preprocess_fn, dtype=dtype, **options
            )
            loader.dataset.key_file = keys  # the argument of ESPnet accepts only a file
            return Utterances(loader, data[0][0])

    return DecodingTask


class ReadAudio:
    """Reads the recordings of an utterance, then calls ESPnet's preprocessing.

    Args:
        args: the training arguments of the model.
        then: ESPnet's preprocessing, or None.

    Attributes:
        kinds: name of data -> sound or kaldi_ark, for the recordings to read.
    """

    def __init__(self, args: argparse.Namespace, then: Any):
        self.then = then
        self.kinds: Mapping[str, str] = {}
        frontend = getattr(args, "frontend_conf", None)
        self.rate = model_rate(frontend)
        inner = (frontend or {}).get("frontend_conf") or {}
        self.channels = bool(
            inner.get("use_beamformer") or inner.get("use_wpe") or hasattr(args, "enh_separator")
        )
        whisper = uses_whisper({"encoder": getattr(args, "encoder", None)})
        # a model without frontend reads features, but Whisper's encoder has its own
        self.prepares = getattr(args, "input_size", None) is None or whisper
        self.most = WINDOW if whisper else None  # seconds
        self._noted: set[str] = set()

    def __call__(self, key: str, data: dict[str, Any]) -> dict[str, Any]:
        """Utterance and {name: entry} -> {name: array}."""
        data = dict(data)
        for name, kind in self.kinds.items():
            try:
                data[name] = self._read(key, str(data[name]), kind)
            except UserError as error:
                raise UserError(f"{key}: {error}") from error
        return data if self.then is None else self.then(key, data)

    def _read(self, key: str, entry: str, kind: str) -> np.ndarray:
        if not self.prepares:
            return read_recording(entry, kind)[0]
        samples = read_utterance(entry, kind, self.rate, self.channels, self._note)
        if self.most is not None and len(samples) >= self.most * self.rate + HOP:
            logging.warning(
                f"{key}: {len(samples) / self.rate:.2f} s of audio are more than the {self.most:g} "
                "s that Whisper encodes: decoded in parts, which are cut where it is quietest"
            )
        return samples

    def _note(self, text: str) -> None:
        if text not in self._noted:  # once, not for every utterance
            self._noted.add(text)
            logging.warning(text)


class Utterances:
    """(keys, batch) of ESPnet's loader; unreadable data is a UserError.

    Args:
        loader: ESPnet's loader.
        name: path of the data, for messages.
    """

    def __init__(self, loader: Iterable, name: str):
        self._loader, self._name = loader, name

    def __iter__(self) -> Iterator[tuple[Sequence[str], dict[str, Any]]]:
        batches, last = None, "the beginning"
        while True:
            try:
                batches = iter(self._loader) if batches is None else batches
                keys, batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                # a worker process prepends its traceback to the message
                lines = str(error).strip().splitlines()
                raise UserError(lines[-1].split(f"{UserError.__name__}: ", 1)[-1]) from error
            except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
                lines = str(error).strip().splitlines()
                reason = one_line(lines[-1]) if lines else repr(error)
                raise UserError(
                    f"{self._name}: data after {last} cannot be read: {reason}"
                ) from error
            last = keys[-1]
            yield keys, batch


def _check(data: Sequence[tuple[str, str, str]], key_file: str | None) -> list[str] | None:
    """Check all lists before decoding begins, and return the keys of `key_file`."""
    names = [name for _, name, _ in data]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError("data_path_and_name_and_type", f"{name} is given twice; keep one")
    listed: dict[str, str] = {}
    for path, name, kind in data:
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist")
        if kind not in AUDIO:
            continue
        entries = read_scp(path)
        listed = listed or entries
        for key, entry in entries.items():
            if kind == "sound" and entry_kind(entry) != kind:
                raise UserError(
                    f"{path}: {key}: {entry} is in an archive: give {path},{name},kaldi_ark"
                )
            file = entry if kind == "sound" else entry.rpartition(":")[0] or entry
            if not entry.endswith("|") and not Path(file).exists():
                raise UserError(f"{path}: {key}: {file} does not exist")
    return None if key_file is None else _keys(key_file, listed)


def _keys(key_file: str, listed: Mapping[str, str]) -> list[str]:
    wanted = dict.fromkeys(words[0] for line in read_lines(key_file) if (words := line.split()))
    if not wanted:
        raise ArgumentError("key_file", f"{key_file} names no utterance")
    for key in wanted if listed else ():
        if key not in listed:
            raise ArgumentError("key_file", f"{key_file}: the data has no utterance {key}")
    # ESPnet reads its files once, so keys must have the order of the files
    return [key for key in listed if key in wanted] if listed else list(wanted)
