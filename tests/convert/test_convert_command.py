"""espnet_kv.bin.convert: its experiments can be decoded and fine-tuned; provenance; errors."""

import errno
import hashlib
import json
import re
from pathlib import Path

import pytest
import small_models
import soundfile
import torch
import yaml
from small_sources import (
    BLOCKS,
    ENCODERS,
    SIZE,
    STREAMING,
    Experiment,
    load,
    outputs,
    run,
    write_audio,
)

from espnet_kv.attention.grouped import MultiHeadAttention
from espnet_kv.bin import asr_inference, asr_train
from espnet_kv.convert import experiment
from espnet_kv.convert.record import read_record, update_report
from espnet_kv.convert.source import PARTS
from espnet_kv.errors import UserError

ALL = ",".join(PARTS)
FULL = ["--attention_type", "mla", "--kv_rank", str(SIZE)]


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> list[str]:
    scp = write_audio(tmp_path_factory.mktemp("audio"))
    return ["--calibration_scp", str(scp), "--calibration_minutes", "0.1"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Experiment:
    return Experiment(tmp_path_factory.mktemp("stock") / "asr_stock", "conformer")


@pytest.fixture(scope="module")
def streaming(tmp_path_factory) -> Experiment:
    source = Experiment(tmp_path_factory.mktemp("kv") / "asr_kv", "kv_conformer", STREAMING)
    small_models.fit_ctc(source.model)
    source.save()
    return source


@pytest.mark.parametrize("encoder", [*ENCODERS, "kv_conformer", "plain"])
def test_full_rank_is_lossless(encoder, audio, tmp_path):
    source = Experiment(tmp_path / "exp", "conformer" if encoder == "plain" else encoder)
    options = audio if encoder != "plain" else []
    assert run(source, tmp_path / "out", *FULL, "--parts", ALL, *options) == 0
    expected = outputs(source.model)
    for module, got in outputs(load(tmp_path / "out")).items():
        torch.testing.assert_close(got, expected[module], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("options", "conf"),
    [
        (["mla", "--kv_rank", "6"], {"kv_rank": 6}),
        (["gqa", "--num_kv_heads", "1"], {"num_kv_heads": 1}),
        (["linear", "--transfer_steps", "2"], {"feature_map": "hedgehog"}),
    ],
    ids=["mla", "gqa", "linear"],
)
def test_only_the_given_part_is_converted(part, options, conf, stock, audio, tmp_path):
    assert run(stock, tmp_path / "out", "--attention_type", *options, "--parts", part, *audio) == 0
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    where = PARTS[part]
    assert config[f"{where.module}_conf"][where.type_key] == options[0]
    assert config[f"{where.module}_conf"][where.conf_key] == conf
    model = load(tmp_path / "out")
    before = stock.model.state_dict()
    for name, tensor in model.state_dict().items():
        if "attn" not in name:
            assert torch.equal(tensor, before[name]), name
    for other in set(PARTS) - {part}:
        if PARTS[other].module == where.module:
            for attention in PARTS[other].attentions(model).values():
                assert isinstance(attention, MultiHeadAttention)


def test_layers_share_a_budget(stock, audio, tmp_path):
    options = ["--attention_type", "mla", "--target_compression", "0.7"]
    assert run(stock, tmp_path / "out", *options, *audio) == 0
    model, record = load(tmp_path / "out"), read_record(tmp_path / "out")
    ranks = [block.self_attn.kv_rank for block in model.encoder.encoders]
    assert sum(ranks) == round(0.3 * 2 * SIZE * BLOCKS)
    assert [layer["conf"]["kv_rank"] for layer in record["layers"]] == ranks


def test_cache_bytes_are_measured_on_the_state(streaming, stock, tmp_path):
    options = ["--attention_type", "mla", "--kv_rank", "4", "--parts", ALL]
    for source, how in ((streaming, "a stream"), (stock, "cannot stream")):
        out = tmp_path / source.folder.name
        assert run(source, out, *options) == 0
        cache = read_record(out)["cache"]
        assert how in cache["encoder"]["before"]["how"]
        for part, length in (("encoder", 256), ("decoder_self", 64), ("decoder_cross", 256)):
            assert cache[part]["before"]["layers"] == [4 * 2 * SIZE * length] * BLOCKS
            assert cache[part]["after"]["layers"] == [4 * 4 * length] * BLOCKS
            for one in cache[part].values():
                assert one["allocated"] >= one["bytes"] == sum(one["layers"])


def test_provenance_and_report(stock, audio, tmp_path):
    out = tmp_path / "out"
    options = ["--attention_type", "gqa", "--target_compression", "0.5", "--seed", "3"]
    assert run(stock, out, *options, *audio) == 0
    record = read_record(out)
    model = (stock.folder / "valid.acc.ave.pth").read_bytes()
    assert record["source"]["model_sha256"] == hashlib.sha256(model).hexdigest()
    assert record["source"]["experiment"] == str(stock.folder)
    assert record["options"]["target_compression"] == 0.5
    assert record["calibration"]["utterances"] == {"fit": 5, "held_out": 1}
    assert record["calibration"]["seed"] == 3
    assert {"torch", "espnet", "espnet_kv", "python"} == set(record["versions"])
    assert "--target_compression 0.5" in record["command"] and record["date"]
    for layer in record["layers"]:
        assert set(layer["errors"]) == {"k", "v", "output"}
        assert all(0 < error < 1 for error in layer["errors"].values())
        assert layer["spectrum"] == sorted(layer["spectrum"], reverse=True)
    assert (out / "conversion.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "conversion.md").read_text()
    assert "num_kv_heads 2" in page and "50.00 %" in page


def test_word_error_rates_are_added_to_the_report(stock, tmp_path):
    out = tmp_path / "out"
    assert run(stock, out, *FULL) == 0
    scored = {"before": tmp_path / "before", "after": out, "fine_tuned": tmp_path / "nothing"}
    for experiment_dir, rate in ((scored["before"], 3.5), (out, 4.25)):
        result = experiment_dir / "decode_x/test_clean/score_wer/result.txt"
        result.parent.mkdir(parents=True)
        result.write_text(f"| Sum/Avg | 9 90 | 97.0 2.0 1.0 0.5 {rate} 15.0 |\n")
    counts = {"utterances": 9, "words": 100, "corr": 97, "sub": 2, "del": 1, "ins": 0}
    wer = counts | {"err": 3, "s_err": 3, "interval": [1.5, 4.75]}
    scores = json.dumps({"streaming": False, "wer": wer})
    place = tmp_path / "before/decode_x/test_other"
    place.mkdir()
    (place / "scores.json").write_text(scores)
    update_report(out, scored)
    assert read_record(out)["wer"] == {
        "before": {"decode_x": {"test_clean": 3.5, "test_other": 3.0}},
        "after": {"decode_x": {"test_clean": 4.25}},
    }
    page = (out / "conversion.md").read_text()
    assert "| before | 3.5 | 3.0 (1.5 to 4.8) |" in page and "| converted | 4.2 |  |" in page
    assert "weights alone" in page


def recognize(folder: Path, scp: Path, out: Path) -> dict[str, str]:
    status = asr_inference.main(
        [
            *["--asr_train_config", str(folder / "config.yaml")],
            *["--asr_model_file", str(folder / "valid.acc.ave.pth")],
            *["--data_path_and_name_and_type", f"{scp},speech,sound", "--output_dir", str(out)],
            *["--ngpu", "0", "--num_workers", "0", "--ctc_weight", "0.9", "--beam_size", "2"],
        ]
    )
    assert status == 0
    lines = (out / "1best_recog/text").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def test_asr_inference_decodes_the_result(streaming, audio, tmp_path):
    scp = write_audio(tmp_path)
    assert run(streaming, tmp_path / "out", *FULL, "--parts", ALL, *audio) == 0
    expected = recognize(streaming.folder, scp, tmp_path / "before")
    assert recognize(tmp_path / "out", scp, tmp_path / "after") == expected
    assert len(set(expected.values())) > 3


@pytest.mark.parametrize("kind", ["stock", "streaming"])
def test_asr_train_fine_tunes_the_result(kind, audio, tmp_path, request):
    source = request.getfixturevalue(kind)
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    options = ["--attention_type", "mla", "--kv_rank", "4", "--parts", ALL]
    assert run(source, out, *options, *audio) == 0
    scp = write_audio(tmp_path)
    text = "".join(f"u{n} ABBA\n" for n in range(6))
    (tmp_path / "text").write_text(text)
    (tmp_path / "shape").write_text("".join(f"u{n} 16000\n" for n in range(6)))
    status = asr_train.main(
        [
            *["--config", str(out / "train.yaml"), "--output_dir", str(tuned)],
            *["--max_epoch", "1", "--num_workers", "0", "--ngpu", "0"],
            *["--optim_conf", "lr=0.0", "--scheduler", "none", "--batch_type", "unsorted"],
            *["--batch_size", "3", "--use_tensorboard", "false", "--num_att_plot", "0"],
            *[word for mode in ("train", "valid") for word in data(mode, tmp_path, scp)],
        ]
    )
    assert status == 0
    before, after = load(out), tuned / "1epoch.pth"
    trained = torch.load(after)
    for name, parameter in before.named_parameters():
        assert torch.equal(trained[name], parameter), name  # unchanged, as the rate is 0


def data(mode: str, folder: Path, scp: Path) -> list[str]:
    paths = f"--{mode}_data_path_and_name_and_type"
    return [
        *[paths, f"{scp},speech,sound", paths, f"{folder / 'text'},text,text"],
        *[f"--{mode}_shape_file", str(folder / "shape")],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mla"], "give either kv_rank or target_compression"),
        (["mla", "--kv_rank", "4", "--target_compression", "0.5"], "either kv_rank or"),
        (["mla", "--kv_rank", "99"], "encoder.encoders.0.self_attn: .*kv_rank: 99.* 1 to 32"),
        (["mla", "--num_kv_heads", "2"], "--num_kv_heads does not apply to attention_type mla"),
        (["mla", "--target_compression", "1.5"], "--target_compression 1.5.*less than 1"),
        (["gqa", "--target_compression", "0.4"], "not possible with 4 heads.*0.5, 0.75"),
        (["gqa", "--num_kv_heads", "3"], "num_kv_heads: 3.*1, 2, 4"),
        (["linear"], "linear is trained on audio: give calibration_scp"),
        (["linear", "--target_compression", "0.5"], "linear attention has a fixed state size"),
        (["flash"], "--attention_type: invalid choice: 'flash'"),
        (["mla", "--kv_rank", "4", "--parts", "encoder,lm"], "--parts: 'encoder,lm' is not a list"),
        (["mla", "--kv_rank", "4", "--calibration_scp", "none.scp"], "none.scp does not exist"),
        (["mla", "--kv_rank", "4", "--calibration_minutes", "0"], "'0' is not more than 0"),
    ],
    ids=str,
)
def test_wrong_options_are_one_error_line(options, message, stock, tmp_path, capsys):
    assert run(stock, tmp_path / "out", "--attention_type", *options) == 1
    assert_one_error(capsys, message)
    assert not any(tmp_path.iterdir())


def test_normalised_keys_are_one_error_line(tmp_path, capsys):
    conf = {"selfattention_layer_type": "selfattn", "pos_enc_layer_type": "abs_pos"}
    source = Experiment(tmp_path / "exp", "conformer", conf | {"qk_norm": True})
    write_audio(tmp_path / "audio")
    calibrated = ("--calibration_scp", str(tmp_path / "audio/wav.scp"))
    for options in (FULL, (*FULL, *calibrated)):
        assert run(source, tmp_path / "out", *options) == 1
        assert_one_error(capsys, "encoder.encoders.0.self_attn: qk_norm")


def test_a_size_that_does_not_fit_is_told_before_the_model_runs(stock, tmp_path, capsys):
    calibrated = ("--calibration_scp", str(write_audio(tmp_path / "audio")))
    for size in (("mla", "--kv_rank", "9999"), ("gqa", "--num_kv_heads", "3")):
        assert run(stock, tmp_path / "out", "--attention_type", *size, *calibrated) == 1
        printed = capsys.readouterr()
        assert "encoder.encoders.0.self_attn: attention_conf" in printed.err
        assert "statistics" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("u1 nowhere.wav\nu2 nowhere.wav\n", r"u[12]: nowhere.wav does not exist \(read as sound"),
        ("u1 {audio}/u1.wav\n", "1 utterance is too few"),
        ("u1 {audio}/u1.wav\nu2 {audio}/short.wav\n", r"1 utterance is too few.*\(1 shorter"),
    ],
    ids=["missing", "one", "short"],
)
def test_unusable_audio_is_one_error_line(lines, message, stock, tmp_path, capsys):
    write_audio(tmp_path / "audio")
    soundfile.write(tmp_path / "audio/short.wav", torch.randn(900).numpy(), 16000)
    (tmp_path / "wav.scp").write_text(lines.format(audio=tmp_path / "audio"))
    options = ["--calibration_scp", str(tmp_path / "wav.scp")]
    assert run(stock, tmp_path / "out", *FULL, *options) == 1
    assert_one_error(capsys, message)


def test_a_directory_with_files_is_not_overwritten(stock, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    assert run(stock, tmp_path / "out", *FULL) == 1
    assert_one_error(capsys, "out exists: remove it")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("broken", ["training_config", "write_pages"])
@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "out: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["disk full", "^C"],
)
def test_a_failure_leaves_no_files(
    broken, failure, status, message, stock, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise failure

    monkeypatch.setattr(experiment, broken, fail)
    assert run(stock, tmp_path / "out", *FULL) == status
    assert_one_error(capsys, message)
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    assert run(stock, tmp_path / "out", *FULL) == 0


def test_the_same_audio_gives_the_same_model(stock, audio, tmp_path):
    options = ["--attention_type", "linear", "--feature_map", "elu", "--transfer_steps", "3"]
    for name in ("one", "other"):
        assert run(stock, tmp_path / name, *options, *audio) == 0
    one, other = (load(tmp_path / name).state_dict() for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    start = stock.model.state_dict()["encoder.encoders.0.self_attn.linear_q.weight"]
    assert not torch.equal(one["encoder.encoders.0.self_attn.linear_q.weight"], start)


def test_damaged_records_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: .* is not a converted model"):
        read_record(tmp_path)
    for text, message in (("{", "is damaged"), (json.dumps({"schema": 0}), "of this version")):
        (tmp_path / "conversion.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_record(tmp_path)


def assert_one_error(capsys, message: str) -> None:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), errors
