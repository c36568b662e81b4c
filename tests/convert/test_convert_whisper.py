"""espnet_kv.bin.convert on Whisper models: self-, cross- and encoder attention."""

import argparse
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_models
import torch
import yaml
from small_sources import load, outputs, run, write_audio

from espnet_kv.convert.calibration import start_tokens
from espnet_kv.convert.choice import replaced
from espnet_kv.convert.factorize import to_shared_mla
from espnet_kv.convert.modules import plain_attention
from espnet_kv.convert.record import read_record
from espnet_kv.convert.source import PARTS
from espnet_kv.espnet.task import ASRTask

pytest.importorskip("whisper.audio", reason="openai-whisper is not installed")

SIZE, BLOCKS = 16, 2
DIMS = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": SIZE,
    "n_audio_head": 4,
    "n_audio_layer": BLOCKS,
    "n_vocab": len(small_models.TOKENS),
    "n_text_ctx": 100,
    "n_text_state": SIZE,
    "n_text_head": 4,
    "n_text_layer": BLOCKS,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SimpleNamespace:
    """An experiment with a small Whisper model of random weights."""
    folder: Path = tmp_path_factory.mktemp("whisper") / "asr_whisper"
    folder.mkdir()
    conf = {"whisper_model": "", "dims": DIMS}
    config = small_models.config(folder) | {
        "encoder": "kv_whisper",
        "encoder_conf": conf,
        "decoder": "kv_whisper",
        "decoder_conf": conf,
        "frontend": None,
        "frontend_conf": {},
        "normalize": None,
        "normalize_conf": {},
        "input_size": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    model = ASRTask.build_model(argparse.Namespace(**config)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0, 0, 0).clamp_(-1, 1).add_(0.2 * torch.randn_like(parameter))
    model_file = folder / "valid.acc.ave.pth"
    torch.save(model.state_dict(), model_file)
    files = ["--asr_train_config", str(folder / "config.yaml"), "--asr_model_file", str(model_file)]
    return SimpleNamespace(model=model, folder=folder, files=files)


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> list[str]:
    scp = write_audio(tmp_path_factory.mktemp("audio"))
    return ["--calibration_scp", str(scp), "--calibration_minutes", "0.1"]


@pytest.mark.parametrize("calibrated", [True, False], ids=["audio", "weights"])
def test_full_rank_is_lossless(calibrated, source, audio, tmp_path):
    options = ["--attention_type", "mla", "--kv_rank", str(SIZE), "--parts", ",".join(PARTS)]
    assert run(source, tmp_path / "out", *options, *(audio if calibrated else ())) == 0
    expected = outputs(source.model)
    for module, got in outputs(load(tmp_path / "out")).items():
        torch.testing.assert_close(got, expected[module], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["mla", "--target_compression", "0.875"], SIZE // 4),
        (["gqa", "--num_kv_heads", "2"], SIZE),
    ],
    ids=["mla", "gqa"],
)
def test_each_part_is_converted_alone(part, options, size, source, audio, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--attention_type", *options, "--parts", part, *audio) == 0
    printed = capsys.readouterr().out
    record, model = read_record(tmp_path / "out"), load(tmp_path / "out")
    before = source.model.state_dict()
    for name, tensor in model.state_dict().items():
        if "attn" not in name:
            assert torch.equal(tensor, before[name]), name
    cache = record["cache"][part]
    length = cache["after"].get("frames") or cache["after"]["tokens"]
    assert cache["before"]["bytes"] == BLOCKS * 4 * 2 * SIZE * length
    assert cache["after"]["bytes"] <= BLOCKS * 4 * size * length
    assert ("saves parameters" in printed) == (part == "encoder")
    assert record["parameters"]["after"] < record["parameters"]["before"]
    assert all(layer["errors"]["output"] > 0 for layer in record["layers"])
    if options[0] == "mla":
        choice = record["choices"][part]
        assert choice["errors"][choice["chosen"]] == min(choice["errors"].values())
        assert f"{part}: chosen: {choice['chosen']}" in printed
        assert choice["chosen"] in (tmp_path / "out/conversion.md").read_text()


@pytest.mark.parametrize("calibrated", [True, False], ids=["audio", "weights"])
def test_cross_attention_of_all_blocks_gets_one_latent(calibrated, source, audio, tmp_path, capsys):
    """As many numbers as the model's size are lossless, whatever the number of blocks."""
    options = ["--attention_type", "mla", "--target_compression", str(1 - 0.5 / BLOCKS)]
    options += ["--parts", "decoder_cross", *(audio if calibrated else ())]
    assert run(source, tmp_path / "out", *options) == 0
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    conf = written["decoder_conf"]["src_attention_conf"]
    assert conf == {"kv_rank": SIZE, "shared_latent": True}
    model, record = load(tmp_path / "out"), read_record(tmp_path / "out")
    torch.testing.assert_close(
        outputs(model)["decoder"], outputs(source.model)["decoder"], rtol=1e-4, atol=1e-4
    )
    assert (
        len({id(block.cross_attn.linear_kv_down) for block in model.decoder.decoders.blocks}) == 1
    )
    cache = record["cache"]["decoder_cross"]
    assert cache["after"]["bytes"] * 2 * BLOCKS == cache["before"]["bytes"]
    assert cache["after"]["allocated"] * 2 * BLOCKS == cache["before"]["allocated"]
    assert ("one latent for all layers, lossless" in capsys.readouterr().out) == calibrated


@pytest.mark.parametrize("calibrated", [True, False], ids=["audio", "weights"])
def test_half_of_every_cache_is_lossless(calibrated, source, audio, tmp_path):
    """Layers of the encoder and self-attention keep latents of their own."""
    options = ["--attention_type", "mla", "--target_compression", "0.5"]
    options += ["--parts", ",".join(PARTS), *(audio if calibrated else ())]
    assert run(source, tmp_path / "out", *options) == 0
    expected, model = outputs(source.model), load(tmp_path / "out")
    for module, got in outputs(model).items():
        torch.testing.assert_close(got, expected[module], rtol=1e-4, atol=1e-4)
    first, last = (block.attn.linear_kv_down for block in model.decoder.decoders.blocks)
    assert not torch.equal(first.weight, last.weight)
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    conf = written["decoder_conf"]["src_attention_conf"]
    assert conf == {"kv_rank": SIZE, "shared_latent": True}  # more would be of no use


def test_blocks_share_one_latent_while_they_are_measured(source):
    part, model = PARTS["decoder_cross"], source.model
    plain = {name: plain_attention(a) for name, a in part.attentions(model).items()}
    modules = dict(zip(plain, to_shared_mla(list(plain.values()), SIZE), strict=True))
    expected = outputs(model)["decoder"]
    with replaced(model, part, modules):
        placed = part.attentions(model).values()
        assert len({id(attention.linear_kv_down) for attention in placed}) == 1
        assert all(attention.shares_state for attention in placed)
        torch.testing.assert_close(outputs(model)["decoder"], expected, rtol=1e-4, atol=1e-4)


def test_a_smaller_latent_of_all_blocks_is_chosen_by_the_error(source, audio, tmp_path):
    options = ["--attention_type", "mla", "--target_compression", str(1 - 0.25 / BLOCKS)]
    options += ["--parts", "decoder_cross", *audio]
    assert run(source, tmp_path / "out", *options) == 0
    choice = read_record(tmp_path / "out")["choices"]["decoder_cross"]
    assert "one latent for all layers" in choice["chosen"]
    conf = yaml.safe_load((tmp_path / "out/config.yaml").read_text())["decoder_conf"]
    assert conf["src_attention_conf"] == {"kv_rank": SIZE // 2, "shared_latent": True}
    outputs(load(tmp_path / "out"))


def test_the_name_of_a_whisper_tokenizer_is_no_file(source, tmp_path):
    """The recipe and asr.sh write it in place of a sentencepiece model."""
    folder = tmp_path / "asr_named"
    shutil.copytree(source.folder, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    names = {"token_type": "whisper_en", "bpemodel": "whisper_en"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | names))
    files = ["--asr_train_config", str(folder / "config.yaml")]
    files += ["--asr_model_file", str(folder / "valid.acc.ave.pth")]
    options = ["--attention_type", "mla", "--kv_rank", "4", "--parts", "decoder_self"]
    assert run(SimpleNamespace(files=files), tmp_path / "out", *options) == 0
    written = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert {key: written[key] for key in names} == names


def test_linear_attention_is_refused_in_one_line(source, audio, tmp_path, capsys):
    options = ["--attention_type", "linear", "--parts", "decoder_self"]
    assert run(source, tmp_path / "out", *options, *audio) != 0
    assert "mla or gqa only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_decoder_inputs_begin_with_language_and_task():
    model = SimpleNamespace(sos=7)
    assert start_tokens(model, {"token_type": "bpe"}) == [7]
    assert start_tokens(model, {"token_type": "whisper_en"}) == [50257, 50362]
    conf = {"whisper_language": "de", "whisper_task": "transcribe"}
    multilingual = {"token_type": "whisper_multilingual", "preprocessor_conf": conf}
    assert start_tokens(model, multilingual) == [50258, 50261, 50359, 50363]
