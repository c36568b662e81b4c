"""Reading of Whisper models in CTranslate2's format, as faster-whisper uses them.

The file holds a version, the name and revision of the model's kind, the variables (name, shape,
type, bytes) and other names of variables; all numbers are little-endian
(CTranslate2, `python/ctranslate2/specs/model_spec.py`).
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from espnet_kv.errors import UserError

MODEL_FILE = "model.bin"
VERSION, KIND = 6, "WhisperSpec"
TYPES = [
    torch.float32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.float16,
    torch.bfloat16,
]


def read_variables(path: Path) -> dict[str, Tensor]:
    """Read all variables of a model.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).variables()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path} is damaged, or no Whisper model of CTranslate2: {error}; copy it again"
        ) from error


class _Reader:
    def __init__(self, file: BinaryIO):
        self._file = file

    def variables(self) -> dict[str, Tensor]:
        version = self._number("I")
        kind = self._string() if version == VERSION else ""
        if kind != KIND:
            raise ValueError(f"it is of kind {kind!r}, version {version}, not {KIND}, {VERSION}")
        self._number("I")  # revision
        found = {}
        for _ in range(self._number("I")):
            name = self._string()
            shape = [self._number("I") for _ in range(self._number("B"))]
            kind_id = self._number("B")
            if kind_id >= len(TYPES):
                raise ValueError(f"{name} has the unknown type {kind_id}")
            data = self._read(self._number("I"))
            found[name] = torch.frombuffer(bytearray(data), dtype=TYPES[kind_id]).reshape(shape)
        for _ in range(self._number("I")):
            alias = self._string()
            found[alias] = found[self._string()]
        return found

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise ValueError(f"it ends after {self._file.tell()} bytes, within a variable")
        return data

    def _number(self, kind: str) -> int:
        return int(struct.unpack(f"<{kind}", self._read(struct.calcsize(f"<{kind}")))[0])

    def _string(self) -> str:
        return self._read(self._number("H")).rstrip(b"\0").decode()


def read_model(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Read a model.bin, or the one in a directory.

    Weights of 8 and 16 bits become float32.

    Returns:
        Dimensions and state dict, as openai-whisper names them.

    Raises:
        UserError: the file is missing, damaged, of another kind, or lacks a variable.
    """
    path = path / MODEL_FILE if path.is_dir() else path
    found = read_variables(path)
    try:
        return _Names(found).model()
    except KeyError as error:
        raise UserError(f"{path} is no Whisper model: it has no variable {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is no Whisper model: {error}") from error


class _Names:
    """From CTranslate2's names of variables to openai-whisper's."""

    def __init__(self, found: dict[str, Tensor]):
        self._found = found
        self._state: dict[str, Tensor] = {}

    def model(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        audio = self._found["encoder/conv1/weight"].shape
        embedding = self._weight("decoder/embeddings/weight")
        heads, layers = {}, {}
        for part in ("encoder", "decoder"):
            heads[part] = int(self._found[f"{part}/num_heads"])
            layers[part] = self._blocks(part)
            self._norm(f"{part}/layer_norm", f"{part}.ln" + "_post" * (part == "encoder"))
            table = self._weight(f"{part}/position_encodings/encodings")
            self._state[f"{part}.positional_embedding"] = table
        for name in ("conv1", "conv2"):
            self._linear(f"encoder/{name}", f"encoder.{name}")
        projection = self._found.get("decoder/projection/weight")
        own = self._found["decoder/embeddings/weight"]
        if projection is not None and projection is not own and not torch.equal(projection, own):
            raise ValueError("decoder/projection is not decoder/embeddings")
        self._state["decoder.token_embedding.weight"] = embedding
        dims = {
            "n_mels": audio[1],
            "n_audio_ctx": len(self._state["encoder.positional_embedding"]),
            "n_audio_state": audio[0],
            "n_audio_head": heads["encoder"],
            "n_audio_layer": layers["encoder"],
            "n_vocab": len(embedding),
            "n_text_ctx": len(self._state["decoder.positional_embedding"]),
            "n_text_state": embedding.size(1),
            "n_text_head": heads["decoder"],
            "n_text_layer": layers["decoder"],
        }
        return dims, self._state

    def _blocks(self, part: str) -> int:
        layer = 0
        while f"{part}/layer_{layer}/ffn/linear_0/weight" in self._found:
            here, there = f"{part}/layer_{layer}", f"{part}.blocks.{layer}"
            self._attention(f"{here}/self_attention", f"{there}.attn", cross=False)
            if part == "decoder":
                self._attention(f"{here}/attention", f"{there}.cross_attn", cross=True)
            self._norm(f"{here}/ffn/layer_norm", f"{there}.mlp_ln")
            self._linear(f"{here}/ffn/linear_0", f"{there}.mlp.0")
            self._linear(f"{here}/ffn/linear_1", f"{there}.mlp.2")
            layer += 1
        return layer

    def _attention(self, here: str, there: str, cross: bool) -> None:
        """Split the stacked projections: q, k, v in self-attention; q and k, v in the other."""
        self._norm(f"{here}/layer_norm", f"{there}_ln")
        stacked = ("linear_0", "linear_1") if cross else ("linear_0",)
        weight = torch.cat([self._weight(f"{here}/{name}/weight") for name in stacked])
        bias = torch.cat([self._weight(f"{here}/{name}/bias") for name in stacked])
        if len(weight) % 3 or len(bias) != len(weight):
            raise ValueError(f"{here}: {len(weight)} rows and {len(bias)} biases are not q, k, v")
        names = ("query", "key", "value")
        for name, rows, biases in zip(names, weight.chunk(3), bias.chunk(3), strict=True):
            self._state[f"{there}.{name}.weight"] = rows.contiguous()
            if name == "key":
                if biases.any():
                    raise ValueError(f"{here}: Whisper's keys have no bias, but these have one")
            else:
                self._state[f"{there}.{name}.bias"] = biases.contiguous()
        self._linear(f"{here}/linear_{len(stacked)}", f"{there}.out")

    def _norm(self, here: str, there: str) -> None:
        self._state[f"{there}.weight"] = self._weight(f"{here}/gamma")
        self._state[f"{there}.bias"] = self._weight(f"{here}/beta")

    def _linear(self, here: str, there: str) -> None:
        for name in ("weight", "bias"):
            self._state[f"{there}.{name}"] = self._weight(f"{here}/{name}")

    def _weight(self, name: str) -> Tensor:
        """A variable in float32; integers are divided by their scale, one for all or per row."""
        value = self._found[name]
        if value.is_floating_point():
            return value.float()
        scale: Any = self._found[f"{name}_scale"].float()
        return value.float() / scale.reshape(-1, *[1] * (value.dim() - 1))
