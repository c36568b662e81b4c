"""Stage 14 of the recipe: profiles made once, with the error rates of stage 13."""

import json
from pathlib import Path

import pytest
from scored import score

from espnet_kv.recipe import runner
from espnet_kv.recipe.__main__ import main
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse
from espnet_kv.recipe.scores import read_scores

REPO = Path(__file__).parents[1]


class TestScores:
    def test_kinds_and_plain_names_first(self, tmp_path):
        score(tmp_path / "decode_asr_fast_asr_model_x/test_clean", 3.5, 1.5)
        score(tmp_path / "decode_asr_fast_beam_size1_asr_model_x/test_clean", 4.5)
        int4 = tmp_path / "decode_asr_streaming_cache_dtypeint4_asr_model_x"
        score(tmp_path / "decode_asr_streaming_asr_model_x/test_clean", 5.5, streaming=True)
        score(int4 / "test_clean", 6.5, streaming=True)
        score(int4 / "test_other", 7.5, streaming=True)
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

    @pytest.mark.parametrize("name", ["decode_chunk16", "decode_asr_nonstreaming"])
    @pytest.mark.parametrize("streaming", [True, False])
    def test_the_kind_is_what_was_run_and_not_its_name(self, tmp_path, name, streaming):
        score(tmp_path / name / "test_clean", 3.5, streaming=streaming)
        kinds = {kind: set(sets) for kind, sets in read_scores(tmp_path).items()}
        other, own = ("offline", "streaming") if streaming else ("streaming", "offline")
        assert kinds == {own: {"test_clean"}, other: set()}

    @pytest.mark.parametrize("streaming", [True, False])
    def test_of_asr_sh_the_log_tells_it(self, tmp_path, streaming):
        decoded = tmp_path / "decode_x/test_clean"
        score(decoded, 3.5)
        (decoded / "decoding.json").unlink()
        (decoded / "logdir").mkdir()
        suffix = "_streaming" if streaming else ""
        command = f"# python3 -m espnet_kv -m espnet2.bin.asr_inference{suffix} --ngpu 0\n"
        (decoded / "logdir/asr_inference.1.log").write_text(command)
        assert bool(read_scores(tmp_path)["streaming"]) == streaming

    def test_nothing_scored(self, tmp_path):
        assert read_scores(tmp_path) == {"offline": {}, "streaming": {}}


class TestStage:
    @pytest.fixture
    def options(self, tmp_path, monkeypatch) -> list[str]:
        """Of a run of stage 14 over a model and a test set."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "conf").symlink_to(REPO / "conf")
        options = ["--profile_args", "--lengths '1 3'", "--ngpu", "0", "--test_sets", "test_clean"]
        options += ["--stage", "14", "--stop_stage", "14"]
        layout = Layout(parse(options))
        exp = layout.asr_exp(layout.args.asr_config[0])
        dump = layout.dump("test_clean")
        for folder in (exp, dump):
            folder.mkdir(parents=True)
        (exp / "valid.acc.ave.pth").write_bytes(b"weights")
        (exp / "config.yaml").write_text("encoder: kv_conformer\n")
        (dump / "wav.scp").write_text("u1 u1.wav\n")
        return options

    @pytest.fixture
    def exp(self, options) -> Path:
        layout = Layout(parse(options))
        return layout.asr_exp(layout.args.asr_config[0])

    @pytest.fixture
    def asked(self, monkeypatch) -> list[list[str]]:
        """Options of the profiles that were made."""
        asked: list[list[str]] = []

        def write(jobs, parallel):
            for job in jobs:
                assert job.module == "espnet_kv.bin.profile" and job.fresh and parallel == 1
                asked.append(list(job.arguments))
                (job.log.parent / "profile.json").write_text('{"name": "x", "wer": {}}')
                job.after()

        monkeypatch.setattr(runner, "run_jobs", write)
        return asked

    def test_a_model_is_profiled_once(self, options, exp, asked, capsys):
        assert main(options) == main(options) == 0
        assert len(asked) == 1
        assert "--wav_scp=dump/raw/test_clean/wav.scp" in asked[0]
        assert "--inference_config=conf/decode_asr.yaml" in asked[0]
        assert asked[0][asked[0].index("--lengths") + 1] == "1 3"
        assert asked[0][asked[0].index("--ngpu") + 1] == "0"
        out = capsys.readouterr().out
        assert f"{exp}/profile is up to date" in out
        assert f"{exp}/profile/profile.json" in out.splitlines()

    def test_other_weights_and_other_options_are_profiled_again(self, options, exp, asked):
        assert main(options) == 0
        (exp / "valid.acc.ave.pth").write_bytes(b"others")
        assert main(options) == 0
        assert main([*options, "--profile_args", ""]) == 0
        assert len(asked) == 3

    def test_error_rates_follow_without_a_new_profile(self, options, exp, asked):
        assert main(options) == 0
        score(exp / "decode_asr_x/test_clean", 5.5, streaming=True)
        assert main(options) == 0
        wer = json.loads((exp / "profile/profile.json").read_text())["wer"]
        assert wer["streaming"]["test_clean"]["wer"] == 5.5
        assert len(asked) == 1

    def test_what_went_wrong_is_told(self, options, exp, capsys):
        """The command itself, which cannot read this model."""
        assert main(options) == 1
        err = capsys.readouterr().err
        assert "profile.log" in err and err.startswith("error: ") and err.count("\n") == 1

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"wer": 1}'])
    def test_a_damaged_profile_is_named(self, options, exp, asked, capsys, content):
        assert main(options) == 0
        (exp / "profile/profile.json").write_text(content)
        assert main(options) == 1
        assert "profile.json is damaged: remove it" in capsys.readouterr().err

    def test_an_untrained_model(self, options, exp, capsys):
        assert main([*options, "--inference_asr_model", "no.pth"]) == 1
        assert "no.pth does not exist: train first" in capsys.readouterr().err
        assert not (exp / "profile").exists()
