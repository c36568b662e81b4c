"""The profile command: its JSON, and what it says of bad input."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from profile_json import schema_keys, values_at
from scored import score
from small_models import RATE, config, save, speech

from espnet_kv.bin import profile as command
from espnet_kv.profile import growth
from espnet_kv.profile.schema import read_profile

REPO = Path(__file__).parents[2]
QUICK = ["--lengths", "1 3", "--repeats", "1", "--chunk_size", "4", "--left_chunks", "2"]
# there is no overlay, weights are trained, and outside a git checkout there is no commit
UNKNOWN = {"model.overlay", "settings.tokens_per_second", "settings.commit"}


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    """Memory is measured here: a process of its own would load ESPnet once more."""

    def measure(task: growth.Task):
        subject = task.load("cpu")
        for run in task.runs(subject):
            yield from run()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "_measure_apart", measure)
        yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """An experiment whose model recognizes tones, and a validation set."""
    folder = tmp_path_factory.mktemp("exp") / "asr_tones"
    folder.mkdir()
    dump = folder / "dump"
    dump.mkdir()
    lines = ""
    for utterance, letters in {"u1": "ABBA", "u2": "B", "u3": "AAB"}.items():
        soundfile.write(dump / f"{utterance}.wav", speech(letters).numpy(), RATE)
        lines += f"{utterance} {dump / utterance}.wav\n"
    (dump / "wav.scp").write_text(lines)
    valid = [[str(dump / "wav.scp"), "speech", "sound"], [str(dump / "text"), "text", "text"]]
    save(folder, valid_data_path_and_name_and_type=valid)
    (folder / "model.pth").rename(folder / "valid.acc.ave.pth")
    (folder / "conversion.json").write_text('{"method": "svd"}')
    score(folder / "decode_x_asr_model_y/test_clean", 3.5, 1.25, interval=0.5)
    return folder


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> list[str]:
    """Options of the searches: a vocabulary of five tokens has no room for the usual beam."""
    file = tmp_path_factory.mktemp("conf") / "decode.yaml"
    file.write_text("beam_size: 3\nctc_weight: 0.5\n")
    return ["--inference_config", str(file), "--streaming_config", str(file)]


def run(*arguments: str) -> Path:
    """The command; the path that it ends with."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command.main([*arguments]) == 0
    return Path(out.getvalue().splitlines()[-1])


def refusal(capsys, *arguments: str) -> str:
    """The one line of an error."""
    assert command.main([*arguments]) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if "flash_attn" not in x]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


class TestCommand:
    @pytest.fixture(scope="class")
    def written(self, experiment, search) -> Path:
        return run("--experiment", str(experiment), *QUICK, *search)

    def test_every_key_of_the_schema_is_written(self, written, experiment):
        assert written == experiment / "profile/profile.json"
        assert read_profile(written).model.attention_label == "mla r8"
        profile = json.loads(written.read_text())
        for path, _, _ in schema_keys():
            assert path in UNKNOWN or None not in values_at(profile, path), path
        assert profile["name"] == "asr_tones"
        assert profile["settings"]["audio"] == str(experiment / "dump/wav.scp")
        assert profile["model"]["weights"] == "trained"
        assert profile["model"]["converted_from"] == {"method": "svd"}
        assert profile["wer"]["offline"]["test_clean"]["wer"] == 3.5
        assert profile["wer"]["offline"]["test_clean"]["wer_interval"] == [3.0, 4.0]
        assert list(profile["cache"]) == ["fp32", "int8"]
        # a layer of rank 8 keeps 2 chunks of 4 frames
        layer = profile["cache"]["fp32"]["layers"][0]
        assert layer["attention"] == 8 * 8 * 4
        # and has room for the chunk that comes next
        assert layer["allocated"]["attention"] == 8 * 12 * 4

    def test_bytes_are_the_same_every_time(self, written, experiment, search, tmp_path):
        output = ["--output", str(tmp_path / "again.json")]
        again = run("--experiment", str(experiment), *QUICK, *search, *output)
        one, two = (json.loads(path.read_text()) for path in (written, again))
        for key in ("cache", "decoder_cache", "compression", "model"):
            assert one[key] == two[key]

    def test_a_configuration_alone_has_random_weights(self, tmp_path, search):
        conf = config(tmp_path)
        keys = ("encoder", "encoder_conf", "decoder", "decoder_conf", "frontend_conf")
        (tmp_path / "train_tiny.yaml").write_text(yaml.safe_dump({key: conf[key] for key in keys}))
        (tmp_path / "mha.yaml").write_text(
            "encoder_conf: {attention_type: mha, attention_conf: null}"
        )
        options = ["--config", str(tmp_path / "train_tiny.yaml"), "--utterances", "2"]
        options += ["--overlay", str(tmp_path / "mha.yaml"), "--vocab_size", "7", *QUICK]
        written = run(*options, *search, "--output", str(tmp_path / "p.json"))
        profile = json.loads(written.read_text())
        assert profile["name"] == "train_tiny_mha"
        assert profile["model"]["weights"] == "random"
        assert profile["settings"]["audio"] == "noise"
        assert profile["settings"]["tokens_per_second"] == 3
        assert profile["time"]["first_token_ms"] is None
        assert profile["wer"] == {}
        assert profile["compression"]["mha"] == {"bounded": 1, "unbounded": 1}
        assert profile["compression"]["input"] == {"bounded": 0.5, "unbounded": 0.5}


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "give one of --experiment"),
            (("--experiment", "no/where"), "no/where does not exist"),
            (("--config", "conf/no.yaml", "--output", "x"), "conf/no.yaml does not exist"),
            (("--config", "{repo}/conf/decode_asr.yaml", "--output", "x"), "names no encoder"),
            (("--config", "{repo}/conf/train_asr_conformer_mla.yaml"), "give --output"),
            (("--asr_model_file", "x.pth"), "give --asr_train_config and --asr_model_file, or"),
            (("--experiment", "x", "--config", "y"), "give one of"),
            (("--experiment", "x", "--overlay", "y"), "--overlay goes with --config"),
            (("--lengths", "5 x"), "--lengths: could not convert"),
            (("--lengths", "0 5"), "--lengths 0 5: give seconds"),
            (("--cache_dtypes", "fp32 int3"), "--cache_dtypes int3: unknown"),
            (("--left_chunks", "-1"), "'-1' is not a whole number of 0 or more"),
            (("--hour", "yes"), "'yes' is neither true nor false"),
            (("--ngpu", "2", "--config", "{tiny}", "--output", "x"), "--ngpu 2: no GPU was found"),
        ],
        ids=lambda x: " ".join(x)[:40] if isinstance(x, tuple) else "",
    )
    def test_options(self, arguments, said, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        places = {"repo": REPO, "tiny": REPO / "conf/train_asr_conformer_mla.yaml"}
        assert said in refusal(capsys, *(word.format(**places) for word in arguments))

    def test_an_untrained_experiment(self, tmp_path, capsys):
        assert "config.yaml does not exist" in refusal(capsys, "--experiment", str(tmp_path))

    def test_too_short_lengths(self, experiment, capsys):
        said = refusal(capsys, "--experiment", str(experiment), "--lengths", "1")
        assert "the longest must be at least two chunks, 1.28 s" in said

    def test_missing_audio(self, experiment, capsys, tmp_path):
        (tmp_path / "wav.scp").write_text("u1 /no/where.wav\n")
        said = refusal(
            capsys, "--experiment", str(experiment), "--wav_scp", str(tmp_path / "wav.scp"), *QUICK
        )
        assert "u1: /no/where.wav does not exist" in said

    def test_graphs_that_have_to_be_there(self, experiment, capsys):
        pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")
        said = refusal(capsys, "--experiment", str(experiment), *QUICK, "--engine", "onnx")
        assert "onnx/model.onnx is not there: export the model" in said
        random = ["--config", str(REPO / "conf/train_asr_conformer_mla.yaml"), "--output", "x"]
        said = refusal(capsys, *random, "--engine", "onnx")
        assert "--engine onnx: for a trained model that streams" in said

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"encoder": "conformer"}, "encoder: conformer keeps no cache.*espnet_kv.bin.convert"),
            ({"encoder_conf": {"causal": False}}, "causal: false"),
            ({"encoder_conf": {"attention_type": "mqa"}}, "attention_type: unknown 'mqa'"),
        ],
        ids=["stock", "looks-ahead", "unknown-attention"],
    )
    def test_a_model_that_cannot_stream(self, changes, said, tmp_path, capsys):
        conf = config(tmp_path, **changes)
        keys = ("encoder", "encoder_conf", "decoder", "decoder_conf", "frontend_conf")
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({key: conf[key] for key in keys}))
        found = refusal(capsys, "--config", str(tmp_path / "x.yaml"), "--output", "x")
        assert re.search(said, found), found

    def test_damaged_provenance(self, experiment, capsys, tmp_path):
        for name in ("config.yaml", "valid.acc.ave.pth", "feats_stats.npz"):
            (tmp_path / name).write_bytes((experiment / name).read_bytes())
        (tmp_path / "run.json").write_text("{")
        said = refusal(capsys, "--experiment", str(tmp_path), *QUICK)
        assert "run.json is damaged" in said
