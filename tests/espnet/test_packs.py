"""Packed models load by zip or tag: in ESPnet's classes, in ours and in every command."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run
from packed import packed, recording
from profile_json import make_profile
from small_models import speech
from small_recipe import REPO

from espnet_kv.config import load_config
from espnet_kv.espnet import packs
from espnet_kv.espnet.packs import unpacked
from espnet_kv.espnet.task import ASRTask
from espnet_kv.names import REMARK
from espnet_kv.profile.schema import Profile
from espnet_kv.recipe.archive import add_card
from espnet_kv.streaming.recognizer import StreamingRecognizer


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """x.zip, in which the names of our classes have the remark."""
    folder = tmp_path_factory.mktemp("pack")
    made = packed(folder).rename(folder / "plain.zip")
    add_card(made, folder / "x.zip", "# A model\n")
    return folder / "x.zip"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Where models are unpacked."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class TestUnpacked:
    def test_once_even_if_the_zip_is_moved(self, pack, tmp_path, home, monkeypatch):
        files = unpacked(str(pack))
        assert set(files) == {"asr_train_config", "asr_model_file"}
        assert all(Path(file).is_relative_to(home) for file in files.values())
        shutil.copy(pack, tmp_path / "y.zip")
        monkeypatch.setattr(packs, "_unpack", None)
        monkeypatch.chdir(tmp_path)
        assert unpacked("y.zip") == files

    def test_another_pack_of_the_same_name_is_unpacked(self, pack, tmp_path):
        file = tmp_path / "x.zip"
        shutil.copy(pack, file)
        before = unpacked(str(file))
        add_card(pack, file, "# Another card\n")
        assert unpacked(str(file)) != before

    def test_a_suffix_other_than_zip(self, pack, tmp_path):
        shutil.copy(pack, tmp_path / "model.pack")
        assert Path(unpacked(str(tmp_path / "model.pack"))["asr_model_file"]).is_file()

    def test_what_a_killed_process_left_is_made_anew(self, pack):
        files = unpacked(str(pack))
        model = Path(files["asr_model_file"])
        (model.parents[2] / packs.RECORD).unlink()
        model.write_bytes(b"half")
        assert unpacked(str(pack)) == files and model.stat().st_size > 1000


def test_names_with_the_remedy_are_ours(pack, tmp_path):
    config = Path(unpacked(str(pack))["asr_train_config"])
    assert yaml.safe_load(config.read_text())["encoder"] == f"kv_conformer{REMARK}"
    assert load_config(config)["encoder"] == "kv_conformer"
    _, args = ASRTask.build_model_from_file(config)
    assert args.encoder == "kv_conformer" and args.decoder == "transformer"


@pytest.mark.slow
def test_espnets_class_in_a_fresh_process(pack, tmp_path):
    """Without the import the error names the remedy, with it the model works."""
    audio = recording(tmp_path)
    code = f"""
        import soundfile
        from espnet2.bin.asr_inference import Speech2Text

        def load():
            return Speech2Text.from_pretrained({str(pack)!r}, ctc_weight=1.0, beam_size=2)
        try:
            load()
        except ValueError as error:
            print(error)
        import espnet_kv
        print(load()(soundfile.read({str(audio)!r}, dtype="float32")[0])[0][0])
    """
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(call, env=env, cwd="/", capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    said, text = ended.stdout.splitlines()
    assert said.startswith("--encoder must be one of (")
    assert said.endswith("--encoder kv_conformer (pip install espnet_kv; import espnet_kv)")
    assert text == "ABBA"


class TestCommands:
    def test_stream(self, pack, tmp_path):
        from espnet_kv.bin.stream import main

        ended = run(main, str(recording(tmp_path)), "--model_tag", str(pack), "--chunk_size", "4")
        assert (ended.returncode, ended.stdout.strip()) == (0, "ABBA"), ended.stderr

    @pytest.mark.parametrize("name", ["asr_inference", "asr_inference_streaming"])
    def test_decoding(self, pack, tmp_path, name):
        from importlib import import_module

        (tmp_path / "wav.scp").write_text(f"u1 {recording(tmp_path)}\n")
        ended = run(
            import_module(f"espnet_kv.bin.{name}").main,
            *("--model_tag", str(pack), "--output_dir", str(tmp_path / "out")),
            *("--data_path_and_name_and_type", f"{tmp_path / 'wav.scp'},speech,sound"),
            *("--ctc_weight", "1.0", "--beam_size", "2", "--num_workers", "0"),
        )
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / "out/1best_recog/text").read_text() == "u1 ABBA\n"

    def test_convert(self, tmp_path):
        from espnet_kv.bin.convert import main

        mha = packed(tmp_path, encoder_conf={"attention_type": "mha", "attention_conf": {}})
        out = tmp_path / "out"
        options = ("--attention_type", "mla", "--kv_rank", "8", "--output_dir", str(out))
        ended = run(main, "--model_tag", str(mha), *options)
        assert ended.returncode == 0, ended.stderr
        assert yaml.safe_load((out / "config.yaml").read_text())["encoder"] == "kv_conformer"

    def test_profile(self, pack, tmp_path, monkeypatch):
        from espnet_kv.bin.profile import main

        subjects = []

        def measured(name, subject, *rest):
            subjects.append(subject)
            return Profile.model_validate(make_profile())

        monkeypatch.setattr("espnet_kv.profile.run.profile", measured)
        (tmp_path / "wav.scp").write_text(f"u1 {recording(tmp_path)}\n")
        out = tmp_path / "profile.json"
        options = ["--wav_scp", str(tmp_path / "wav.scp"), "--ngpu", "0", "--output", str(out)]
        assert main(["--model_tag", str(pack), *options]) == 0
        model = json.loads(out.read_text())["model"]
        assert type(subjects[0].encoder).__name__ == "KVConformerEncoder"
        assert model["model_file"] == unpacked(str(pack))["asr_model_file"]


def test_two_recognizers_of_one_pack(pack):
    """The second does not write what the first one reads."""
    first = StreamingRecognizer.from_pretrained(str(pack), chunk_size=4, left_chunks=2)
    second = StreamingRecognizer.from_pretrained(str(pack), beam_size=1)
    audio = speech("BAAB").numpy().astype(np.float32)
    assert first(audio)[0][0] == second(audio)[0][0] == "BAAB"
