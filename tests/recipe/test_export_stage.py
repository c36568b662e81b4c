"""Stage export: graphs of trained models, made again when a model or a setting has changed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from exports import LETTERS
from forecasts import pretend_done, recipe_place, stages
from packed import BEST, NAME, experiment
from small_models import write_scp
from small_recipe import REPO, leftovers, run, said

pytest.importorskip("onnx", reason="the extra [serve] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")

SIZES = "--chunk_size 4 --left_chunks 2 --int8 false"
EXPORT = ["--stage", "export", "--asr_tag", "x", "--test_sets", "test_clean"]
EXPORT += ["--audio_format", "wav", "--export_args", SIZES]


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe's directory with a model and a test set."""
    experiment(tmp_path)
    dump = tmp_path / "dump/raw/test_clean"
    dump.mkdir(parents=True)
    write_scp(dump, LETTERS)
    (tmp_path / "conf").symlink_to(REPO / "conf")
    return tmp_path


def record(recipe: Path) -> dict:
    return json.loads((recipe / "exp" / NAME / "onnx/export.json").read_text())


def test_the_graph_lies_where_engine_onnx_looks_for_it(recipe):
    code, out, err = run(recipe, *EXPORT)
    assert code == 0, err
    assert f"exp/{NAME}/onnx" in out and "export asr_x: done (1/1)" in out
    found = {file.name for file in (recipe / "exp" / NAME / "onnx").iterdir()}
    assert found == {"model.onnx", "tokens.txt", "export.json", ".done.json"}
    assert "chunks compared" in (recipe / "exp" / NAME / "export.log").read_text()
    assert leftovers(recipe / "exp") == []
    assert "up to date" in run(recipe, *EXPORT)[1]
    (recipe / "exp" / NAME / "onnx/model.onnx").write_bytes(b"damaged")
    code, out, _ = run(recipe, *EXPORT, "--export_args", f"{SIZES} --cache_dtype int8")
    assert code == 0 and "--export_args was" in out
    assert record(recipe)["cache_dtype"] == "int8"


def test_chunks_are_those_of_the_streaming_configuration(recipe):
    letters = [letters * 4 for letters in LETTERS]  # 50 chunks of 16 frames
    write_scp(recipe / "dump/raw/test_clean", letters)
    assert run(recipe, *EXPORT, "--export_args", "--int8 false")[0] == 0
    assert (record(recipe)["chunk_size"], record(recipe)["left_chunks"]) == (16, 4)


def test_a_failure_is_one_line_and_leaves_nothing(recipe):
    line = said(run(recipe, *EXPORT, "--export_args", "--left_chunks -1"))
    assert line.startswith("error: export asr_x failed: --left_chunks -1: a cache of all frames")
    assert not (recipe / "exp" / NAME / "onnx").exists()


def test_a_model_that_cannot_stream_is_named_and_others_are_exported(recipe):
    exp = recipe / "exp/asr_offline_raw_en_bpe5000_sp"
    shutil.copytree(recipe / "exp" / NAME, exp)
    config = yaml.safe_load((exp / "config.yaml").read_text())
    config["encoder_conf"]["causal"] = False
    (exp / "config.yaml").write_text(yaml.safe_dump(config))
    (recipe / "exp" / NAME).rename(recipe / "exp/asr_online_raw_en_bpe5000_sp")
    for name in ("offline", "online"):
        (recipe / f"{name}.yaml").write_text("encoder: kv_conformer\n")
    both = ["--asr_tag", "", "--asr_config", "offline.yaml online.yaml"]
    line = said(run(recipe, *EXPORT, *both))
    assert line.startswith(f"error: export {exp.name} failed: ") and "causal" in line
    assert (recipe / "exp/asr_online_raw_en_bpe5000_sp/onnx/model.onnx").is_file()
    assert not (exp / "onnx").exists()


def test_graphs_of_the_users_own_are_kept(recipe):
    own = recipe / "exp" / NAME / "onnx/model.onnx"
    own.parent.mkdir()
    own.write_bytes(b"own")
    line = said(run(recipe, *EXPORT))
    assert f"exp/{NAME}/onnx was not made by this recipe: move it, or remove it" in line
    assert own.read_bytes() == b"own"


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        (["--stage", "15"], False),
        (["--stage", "15", "--skip_export", "false"], True),
        (["--stage", "18"], True),
        (["--stage", "upload", "--stop_stage", "export", "--hf_repo", "me/model"], False),
    ],
)
def test_it_runs_where_it_is_asked_for(recipe, options, ran):
    _, out, err = run(recipe, *EXPORT[2:], *options, "--dry_run", "true")
    line = next(line for line in out.splitlines() if "export asr_x" in line)
    assert ("would run" in line) == ran and ("skipped" in line) != ran, err


def test_contradictions(recipe):
    line = said(run(recipe, *EXPORT, "--skip_export", "true"))
    assert "--stage export --skip_export true: one asks for what the other skips" in line


def test_an_untrained_model(recipe):
    (recipe / "exp" / NAME / BEST).unlink()
    assert f"{BEST} does not exist: train first" in said(run(recipe, *EXPORT))


@pytest.mark.parametrize(
    ("options", "again"),
    [
        (["--export_args", "--chunk_size 8"], True),
        (["--inference_asr_model", "valid.acc.best.pth"], True),
        (["--use_streaming", "true", "--inference_config", "own.yaml"], True),
        (["--profile_args", "--utterances 5"], False),
        (["--nj", "3"], False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_it_depends_on(tmp_path, monkeypatch, options, again):
    recipe_place(tmp_path, monkeypatch)
    Path("own.yaml").write_text("chunk_size: 16\nleft_chunks: 8\n")
    given = ("--corpus", "synth", "--skip_export", "false")
    pretend_done(*given)
    assert 18 not in stages(*given)
    assert (18 in stages(*given, *options)) == again
