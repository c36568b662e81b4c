"""Weights of Whisper models: files of openai-whisper and of CTranslate2, names, and damage."""

import struct
from pathlib import Path

import pytest
import torch
from small_whisper import DIMS, SIZE, VOCABULARY

from espnet_kv.decoder.whisper_decoder import KVWhisperDecoder
from espnet_kv.encoder.whisper_encoder import KVWhisperEncoder
from espnet_kv.errors import ConfigError, UserError
from espnet_kv.espnet import whisper_weights
from espnet_kv.espnet.whisper_weights import load_whisper, sizes_of, weights_follow, whisper_package

IDS = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}


def random_model():
    model = load_whisper(None, None, DIMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def variables_of(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A model as CTranslate2's converter stores it; written here without the reader's code."""
    found: dict[str, torch.Tensor] = {}

    def put(name: str, value: torch.Tensor, weight: bool = True) -> None:
        if dtype is torch.int8 and weight and value.dim() > 1:
            scale = 127 / value.flatten(1).abs().amax(1)
            rows = scale.view(-1, *[1] * (value.dim() - 1))
            found[name], found[f"{name}_scale"] = (value * rows).round().to(torch.int8), scale
        else:
            found[name] = value if dtype is torch.int8 else value.to(dtype)

    def linear(name: str, *modules) -> None:
        put(f"{name}/weight", torch.cat([m.weight for m in modules]))
        zeros = torch.zeros(SIZE)
        put(f"{name}/bias", torch.cat([zeros if m.bias is None else m.bias for m in modules]))

    def norm(name: str, module) -> None:
        put(f"{name}/gamma", module.weight)
        put(f"{name}/beta", module.bias)

    for part, half in (("encoder", model.encoder), ("decoder", model.decoder)):
        found[f"{part}/num_heads"] = torch.tensor(DIMS["n_text_head"], dtype=torch.int16)
        put(f"{part}/position_encodings/encodings", half.positional_embedding, False)
        for index, block in enumerate(half.blocks):
            at = f"{part}/layer_{index}"
            own, src = block.attn, block.cross_attn
            norm(f"{at}/self_attention/layer_norm", block.attn_ln)
            linear(f"{at}/self_attention/linear_0", own.query, own.key, own.value)
            linear(f"{at}/self_attention/linear_1", own.out)
            if src is not None:
                norm(f"{at}/attention/layer_norm", block.cross_attn_ln)
                linear(f"{at}/attention/linear_0", src.query)
                linear(f"{at}/attention/linear_1", src.key, src.value)
                linear(f"{at}/attention/linear_2", src.out)
            norm(f"{at}/ffn/layer_norm", block.mlp_ln)
            linear(f"{at}/ffn/linear_0", block.mlp[0])
            linear(f"{at}/ffn/linear_1", block.mlp[2])
    norm("encoder/layer_norm", model.encoder.ln_post)
    norm("decoder/layer_norm", model.decoder.ln)
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}/weight", getattr(model.encoder, name).weight)
        put(f"encoder/{name}/bias", getattr(model.encoder, name).bias)
    put("decoder/embeddings/weight", model.decoder.token_embedding.weight)
    return {name: value.detach() for name, value in found.items()}


def write(path: Path, variables: dict[str, torch.Tensor], kind: str = "WhisperSpec") -> Path:
    data = struct.pack("<I", 6) + text(kind) + struct.pack("<II", 3, len(variables))
    for name, value in sorted(variables.items()):
        raw = value.contiguous().numpy().tobytes()
        data += text(name) + struct.pack("<B", value.dim())
        data += b"".join(struct.pack("<I", n) for n in value.shape)
        data += struct.pack("<BI", IDS[value.dtype], len(raw)) + raw
    data += struct.pack("<I", 1) + text("decoder/projection/weight")
    path.write_bytes(data + text("decoder/embeddings/weight"))
    return path


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 0.0), (torch.float16, 1e-3), (torch.int8, 5e-3)],
    ids=["fp32", "fp16", "int8"],
)
def test_a_model_of_ctranslate2(tmp_path, dtype, tolerance):
    model = random_model()
    write(tmp_path / "model.bin", variables_of(model, dtype))
    for name in (tmp_path, tmp_path / "model.bin"):
        loaded = load_whisper(str(name), None, None)
        assert loaded.dims == model.dims
        for key, value in model.state_dict().items():
            torch.testing.assert_close(
                loaded.state_dict()[key], value, rtol=tolerance, atol=tolerance
            )


def test_encoder_and_decoder_hold_the_weights(tmp_path):
    model = random_model()
    for file in (tmp_path / "model.bin", tmp_path / "small.pt"):
        if file.suffix == ".pt":
            saved = {"dims": DIMS, "model_state_dict": model.state_dict()}
            torch.save(saved, file)
        else:
            write(file, variables_of(model, torch.float32))
        encoder = KVWhisperEncoder(whisper_model=str(file))
        decoder = KVWhisperDecoder(VOCABULARY, SIZE, whisper_model=str(file))
        for ours, theirs in ((encoder.encoders, model.encoder), (decoder.decoders, model.decoder)):
            assert list(ours.state_dict()) == list(theirs.state_dict())
            for key, value in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[key], value), key
        assert encoder.dims == decoder.dims == DIMS


def damaged(tmp_path: Path, how: str) -> Path:
    variables = variables_of(random_model(), torch.float32)
    file = tmp_path / "model.bin"
    if how == "kind":
        return write(file, variables, "TransformerSpec")
    if how == "missing":
        del variables["decoder/layer_1/attention/linear_1/weight"]
    elif how == "bias":
        variables["encoder/layer_0/self_attention/linear_0/bias"][SIZE] = 1
    elif how == "shape":
        variables["encoder/conv2/weight"] = torch.zeros(3, 3)
    elif how == "rows":
        variables["encoder/layer_0/self_attention/linear_0/weight"] = torch.zeros(95, SIZE)
    data = write(file, variables).read_bytes()
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = b""
    elif how == "text":
        data = b"version https://git-lfs.github.com/spec/v1\n" * 9
    elif how == "type":
        at = data.index(b"conv1/bias\0") + len(b"conv1/bias\0") + 5
        data = data[:at] + b"\x09" + data[at + 1 :]
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kind", "of kind 'TransformerSpec'"),
        ("missing", "no variable 'decoder/layer_1/attention/linear_1/weight'"),
        ("bias", "keys have no bias"),
        ("shape", "conv2"),
        ("rows", "are not q, k, v"),
        ("cut", "ends after"),
        ("empty", "ends after 0 bytes"),
        ("text", "damaged"),
        ("type", "unknown type 9"),
    ],
)
def test_a_damaged_model_of_ctranslate2_is_one_line(tmp_path, how, message):
    file = damaged(tmp_path, how)
    with pytest.raises(UserError, match=message) as caught:
        load_whisper(str(file), None, None)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 99, {"a": torch.zeros(1)}, {"dims": DIMS}, [1]], ids=str
)
def test_a_damaged_file_of_openai_is_one_line(tmp_path, content):
    file = tmp_path / "tiny.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises((UserError, ConfigError), match=r"tiny\.pt") as caught:
        load_whisper(str(file), None, None)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"model\.bin does not exist"):
        load_whisper(str(tmp_path), None, None)


def test_sizes_of_the_public_models():
    """Parameters in millions, arXiv 2212.04356, table 1."""
    millions = {"tiny": 39, "base": 74, "small": 244, "medium": 769, "large-v2": 1550}
    names = set(whisper_package().available_models())
    assert {name for name in names if sizes_of(name)} == names
    for name, count in millions.items():
        sizes = sizes_of(name)
        package = whisper_package().model
        halves = []
        for half, place in ((package.AudioEncoder, "audio"), (package.TextDecoder, "text")):
            inputs = sizes["n_mels" if place == "audio" else "n_vocab"]
            own = [sizes[f"n_{place}_{key}"] for key in ("ctx", "state", "head", "layer")]
            with torch.device("meta"):
                halves.append(half(inputs, *own))
        total = sum(p.numel() for half in halves for p in half.parameters()) / 1e6
        assert abs(total / count - 1) < 0.06, (name, total)
    assert sizes_of("tiny.en")["n_vocab"] == 51864
    assert sizes_of("turbo")["n_mels"] == 128 and sizes_of("turbo")["n_text_layer"] == 4
    assert sizes_of("large.en") is None and sizes_of("huge") is None


def test_nothing_is_loaded_where_a_checkpoint_follows(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(whisper_package(), "load_model", no_network)
    monkeypatch.setitem(whisper_weights.SIZES, "nano", (SIZE, 4, 2))
    with pytest.raises(UserError, match=r"nano cannot be loaded \(no network\): put nano\.pt"):
        load_whisper("nano", None, None)
    with weights_follow():
        assert load_whisper("nano", None, None).dims.n_text_state == SIZE
        assert load_whisper("gone.pt", None, DIMS).dims.n_vocab == VOCABULARY
        with pytest.raises(UserError, match=r"gone\.pt does not tell the sizes .* give dims"):
            load_whisper("gone.pt", None, None)


def test_dims_of_other_weights_are_refused(tmp_path):
    file = write(tmp_path / "model.bin", variables_of(random_model(), torch.float32))
    with pytest.raises(ConfigError, match="dims"):
        load_whisper(str(file), None, DIMS | {"n_text_head": 2})
