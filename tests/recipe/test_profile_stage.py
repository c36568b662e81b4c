"""Stage 14 of the recipe: profiles made once, with the error rates of stage 13."""

import json
from pathlib import Path

import pytest
from profile_json import make_profile, write_profile
from scored import score, score_as_asr_sh

from espnet_kv.errors import UserError
from espnet_kv.profile import schema
from espnet_kv.profile.schema import read_profile
from espnet_kv.recipe import profiling, runner
from espnet_kv.recipe.__main__ import main
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse
from espnet_kv.scores import read_scores

REPO = Path(__file__).parents[2]
SCORES = json.dumps(
    {
        "streaming": True,
        "wer": {"utterances": 4, "words": 40, "corr": 39, "sub": 1, "del": 0, "ins": 0}
        | {"err": 1, "s_err": 1, "missing": 0},
    }
)


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
        score_as_asr_sh(tmp_path / "decode_x/test_clean", 3.5, streaming=streaming)
        other, own = ("offline", "streaming") if streaming else ("streaming", "offline")
        found = read_scores(tmp_path)
        row = {"wer": 3.5, "decoding": "decode_x"}
        assert found == {own: {"test_clean": row}, other: {}}

    def test_the_kind_is_that_of_each_test_set(self, tmp_path):
        score(tmp_path / "decode_x/test_clean", 3.5, streaming=True)
        score_as_asr_sh(tmp_path / "decode_x/test_other", 4.5)
        kinds = {kind: set(sets) for kind, sets in read_scores(tmp_path).items()}
        assert kinds == {"streaming": {"test_clean"}, "offline": {"test_other"}}

    def test_scores_json_counts_where_there_is_one(self, tmp_path):
        decoded = tmp_path / "decode_x/test_clean"
        score_as_asr_sh(decoded, 9.5)
        (decoded / "scores.json").write_text(SCORES)
        assert read_scores(tmp_path)["streaming"]["test_clean"]["wer"] == 2.5
        assert read_scores(tmp_path)["offline"] == {}

    def test_errors_in_a_reference_without_words_are_no_rate(self, tmp_path):
        decoded = tmp_path / "decode_x/test_clean"
        decoded.mkdir(parents=True)
        record = json.loads(SCORES)
        record["wer"] |= {"words": 0, "corr": 0, "sub": 0, "ins": 1}
        (decoded / "scores.json").write_text(json.dumps(record))
        assert read_scores(tmp_path)["streaming"]["test_clean"]["wer"] is None

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("{", ""),
            ('"streaming": true, ', ""),
            ("true", '"yes"'),
            ('"err": 1', '"err": "1"'),
            ('"err": 1', '"err": -1'),
            ('"err": 1', '"err": 1.5'),
            ('"err": 1', '"err": 2'),
            ('"words": 40', '"words": 41'),
            ('"corr": 39', '"corr": 900'),
            ('"s_err": 1', '"s_err": 5'),
            ('"ins": 0, "err": 1', f'"ins": {10**400}, "err": {10**400 + 1}'),
            ('"words": 40, ', ""),
            ('"err": 1', '"interval": [3, 1], "err": 1'),
            ('"err": 1', '"interval": 3, "err": 1'),
            ('"err": 1', '"interval": [1, NaN], "err": 1'),
            ('"err": 1', '"interval": ["a", "b"], "err": 1'),
            ('"streaming": true', '"streaming": true, "cache_dtype": 8'),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path, old, new):
        decoded = tmp_path / "decode_x/test_clean"
        decoded.mkdir(parents=True)
        (decoded / "scores.json").write_text(SCORES.replace(old, new, 1))
        with pytest.raises(UserError, match=r"scores.json is damaged .*score again \(stage 13\)"):
            read_scores(tmp_path)

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
                assert job.module == "espnet_kv.bin.profile" and not job.fresh and parallel == 1
                asked.append(list(job.arguments))
                write_profile(job.log.parent / "profile.json", make_profile(wer={}))
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

    def test_a_graph_that_was_exported_since_is_profiled(self, options, exp, asked):
        main(options)
        (exp / "onnx").mkdir()
        (exp / "onnx/model.onnx").write_text("graph")
        for times in (2, 2):
            main(options)
            assert len(asked) == times

    def test_a_profile_of_an_older_version_is_made_again(self, options, exp, asked, monkeypatch):
        """Stage 15 refuses it and says so: stage 14 must not find it up to date."""
        with monkeypatch.context() as then:
            then.setattr(profiling, "SCHEMA", "espnet_kv.profile/1")
            assert main(options) == 0
        assert main(options) == main(options) == 0
        assert len(asked) == 2

    def test_error_rates_follow_without_a_new_profile(self, options, exp, asked):
        assert main(options) == 0
        score(exp / "decode_asr_x/test_clean", 5.5, streaming=True)
        assert main(options) == 0
        file = exp / "profile/profile.json"
        profile = read_profile(file)
        assert profile.wer["streaming"]["test_clean"].wer == 5.5
        # the file is written as the profile command writes it
        schema.write_profile(exp / "again.json", profile.model_dump(by_alias=True))
        assert file.read_text() == (exp / "again.json").read_text()
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
        err = capsys.readouterr().err
        assert "profile.json: " in err and "remove it and profile again (stage 14)" in err

    def test_an_untrained_model(self, options, exp, capsys):
        assert main([*options, "--inference_asr_model", "no.pth"]) == 1
        assert "no.pth does not exist: train first" in capsys.readouterr().err
        assert not (exp / "profile").exists()
