"""Stage 14 of the recipe: profiles made once, with the error rates of stage 13."""

import json
import subprocess
from pathlib import Path

import pytest
from scored import score

from espnet_kv.errors import UserError
from espnet_kv.recipe import profile_stage
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse
from espnet_kv.recipe.scores import read_scores

REPO = Path(__file__).parents[1]


class TestScores:
    def test_kinds_and_plain_names_first(self, tmp_path):
        score(tmp_path / "decode_asr_fast_asr_model_x/test_clean", 3.5, 1.5)
        score(tmp_path / "decode_asr_fast_beam_size1_asr_model_x/test_clean", 4.5)
        score(tmp_path / "decode_asr_streaming_asr_model_x/test_clean", 5.5)
        score(tmp_path / "decode_asr_streaming_cache_dtypeint4_asr_model_x/test_clean", 6.5)
        score(tmp_path / "decode_asr_streaming_cache_dtypeint4_asr_model_x/test_other", 7.5)
        found = read_scores(tmp_path)
        assert found["offline"] == {
            "test_clean": {"wer": 3.5, "cer": 1.5, "decoding": "decode_asr_fast_asr_model_x"}
        }
        assert found["streaming"]["test_clean"]["wer"] == 5.5
        assert found["streaming"]["test_other"]["decoding"].endswith("int4_asr_model_x")
        chosen = "decode_asr_fast_beam_size1_asr_model_x"
        preferred = read_scores(tmp_path, [chosen])
        assert preferred["offline"]["test_clean"] == {
            "wer": 4.5,
            "decoding": chosen,
        }
        assert read_scores(tmp_path, [chosen, chosen]) == preferred

    def test_nothing_scored(self, tmp_path):
        assert read_scores(tmp_path) == {"offline": {}, "streaming": {}}


class TestStage:
    @pytest.fixture
    def layout(self, tmp_path, monkeypatch) -> Layout:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "conf").symlink_to(REPO / "conf")
        layout = Layout(parse(["--profile_args", "--lengths '1 3'", "--ngpu", "0"]))
        exp = layout.asr_exp(layout.args.asr_config[0])
        dump = layout.dump("test_clean")
        for folder in (exp, dump):
            folder.mkdir(parents=True)
        (exp / "valid.acc.ave.pth").write_bytes(b"weights")
        (exp / "config.yaml").write_text("encoder: kv_conformer\n")
        (dump / "wav.scp").write_text("u1 u1.wav\n")
        return layout

    @pytest.fixture
    def asked(self, monkeypatch) -> list[list[str]]:
        """Options of the profiles that were made."""
        asked: list[list[str]] = []

        def write(command, stderr, check):
            asked.append(command[3:])
            out = Path(command[command.index("--experiment") + 1]) / "profile/profile.json"
            out.write_text('{"name": "x", "wer": {}}')
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(profile_stage.subprocess, "run", write)
        return asked

    def test_a_model_is_profiled_once(self, layout, asked, capsys):
        profile_stage.profile_models(layout)
        profile_stage.profile_models(layout)
        assert len(asked) == 1
        options = dict(zip(asked[0][::2], asked[0][1::2], strict=True))
        assert options["--wav_scp"] == "dump/raw/test_clean/wav.scp"
        assert options["--inference_config"] == "conf/decode_asr.yaml"
        assert options["--lengths"] == "1 3" and options["--ngpu"] == "0"
        assert "is up to date" in capsys.readouterr().out

    def test_other_weights_and_other_options_are_profiled_again(self, layout, asked):
        profile_stage.profile_models(layout)
        exp = layout.asr_exp(layout.args.asr_config[0])
        (exp / "valid.acc.ave.pth").write_bytes(b"others")
        profile_stage.profile_models(layout)
        layout.args.profile_args = ""
        profile_stage.profile_models(layout)
        assert len(asked) == 3

    def test_error_rates_follow_without_a_new_profile(self, layout, asked):
        profile_stage.profile_models(layout)
        exp = layout.asr_exp(layout.args.asr_config[0])
        score(exp / "decode_asr_streaming_asr_model_x/test_clean", 5.5)
        profile_stage.profile_models(layout)
        wer = json.loads((exp / "profile/profile.json").read_text())["wer"]
        assert wer["streaming"]["test_clean"]["wer"] == 5.5
        assert len(asked) == 1

    def test_what_went_wrong_is_told(self, layout, monkeypatch):
        def fail(command, stderr, check):
            stderr.write("error: it does not stream\n")
            return subprocess.CompletedProcess(command, 1)

        monkeypatch.setattr(profile_stage.subprocess, "run", fail)
        with pytest.raises(UserError, match=r"it does not stream.*profile.log"):
            profile_stage.profile_models(layout)

    def test_an_untrained_model(self, layout):
        layout.args.inference_asr_model = "no.pth"
        with pytest.raises(UserError, match=r"no.pth does not exist: train first"):
            profile_stage.profile_models(layout)
