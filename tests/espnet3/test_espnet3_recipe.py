"""The recipe for ESPnet3: all stages on mini AN4, and the commands of docs/espnet3.md."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

REPO = Path(__file__).parents[2]
RECIPE = REPO / "egs3/librispeech_100_kv/asr"
DRIVER = Path(__file__).with_name("recipe_driver.py")
CONFIGS = {
    "inference": "conf/inference_mini_an4.yaml",
    "metrics": "conf/metrics_mini_an4.yaml",
    "publication": "conf/publication.yaml",
}
PREPARE = ("create_dataset", "train_tokenizer", "collect_stats")
STAGES = (*PREPARE, "train", "infer", "measure", "profile", "pack_model")
UTTERANCES = ["fcaw-cen8-b", "mmxg-cen8-b"]


def copy(folder: Path) -> Path:
    """The recipe where ESPnet3 expects one, below a directory egs3."""
    place = folder / "egs3/librispeech_100_kv/asr"
    ignored = shutil.ignore_patterns("__pycache__", "data", "exp", "logs")
    return Path(shutil.copytree(RECIPE, place, ignore=ignored))


def words(stages: list[str] | tuple[str, ...], training: str, **others: str) -> list[str]:
    """A command line after `python run.py`."""
    configs = {"training": training, **CONFIGS, **others}
    options = (word for role, file in configs.items() for word in (f"--{role}_config", file))
    return ["--stages", *stages, *options]


def environment(**changes: str) -> dict[str, str]:
    without = {"LIBRISPEECH", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
    kept = {name: value for name, value in os.environ.items() if name not in without}
    fixed = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | fixed | changes


def runs(recipe: Path, *lines: list[str], **env: str) -> list:
    """What each of several runs ended with, in one process."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), json.dumps(lines)],
        cwd=recipe,
        env=environment(HF_HOME=str(recipe / "hf"), **env),
        capture_output=True,
        text=True,
    )
    ended = re.findall(r"^ended: (.*)$", done.stdout, re.MULTILINE)
    assert len(ended) == len(lines), done.stderr[-3000:]
    return [json.loads(text) for text in ended]


def texts(file: Path) -> dict[str, str]:
    """Utterance -> text of a .scp; there may be none."""
    lines = (line.partition(" ") for line in file.read_text().splitlines())
    return {utterance: text.strip() for utterance, _, text in lines}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A recipe in which every stage was run for mla, by run.py."""
    recipe = copy(tmp_path_factory.mktemp("mla"))
    done = subprocess.run(
        [sys.executable, "run.py", *words(STAGES, "conf/training_mini_an4_mla.yaml")],
        cwd=recipe,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe


@pytest.mark.slow
def test_every_stage_leaves_its_result(trained):
    exp = trained / "exp/training_mini_an4_mla"
    config = yaml.safe_load((exp / "config.yaml").read_text())
    assert config["encoder"] == "kv_conformer"
    assert config["encoder_conf"]["attention_type"] == "mla"
    assert config["normalize"] == "global_mvn", "collect_stats took it out"
    sets = {
        name: (trained / f"data/mini_an4/manifest/{name}.tsv").read_text().splitlines()
        for name in ("train", "valid", "test")
    }
    assert {name: len(lines) for name, lines in sets.items()} == {"train": 4, "valid": 1, "test": 2}
    assert sets["test"][0].split("\t")[2] == "ELEVEN TWENTY SEVEN FIFTY SEVEN"
    decoded = exp / "inference_mini_an4"
    assert list(texts(decoded / "test/text.scp")) == UTTERANCES
    references = texts(decoded / "test/dataset/text.scp")
    assert references["mmxg-cen8-b"] == "OCTOBER TWENTY FOUR NINETEEN SEVENTY"
    metrics = json.loads((decoded / "metrics.json").read_text())
    assert {key for sets in metrics.values() for key in sets["test"]} == {"WER", "CER"}


@pytest.mark.slow
def test_the_profile_is_of_the_trained_model(trained):
    exp = trained / "exp/training_mini_an4_mla"
    profile = json.loads((exp / "profile/profile.json").read_text())
    assert profile["model"]["weights"] == "trained"
    held = profile["cache"]["fp32"]["lengths"][-1]["bounded"]["bytes"]["attention"]
    # blocks, chunks of left context, frames of a chunk, rank, bytes of a number
    assert held == 2 * 4 * 16 * 16 * 4
    metrics = json.loads((exp / "inference_mini_an4/metrics.json").read_text())
    wer = next(sets["test"]["WER"] for sets in metrics.values() if "WER" in sets["test"])
    assert profile["wer"]["offline"]["test"]["wer"] == wer
    table = (trained / "exp/RESULTS.md").read_text()
    for column in ("cache, allocated (kB)", "compression against mha", "utterance, mean (ms)"):
        assert column in table
    assert "peak memory, streaming (MB)" in table and "conformer mla r16" in table


@pytest.mark.slow
def test_the_bundle_recognizes_the_same_from_elsewhere(trained, tmp_path, monkeypatch):
    import soundfile
    from espnet3.publication import InferenceModel

    monkeypatch.chdir(tmp_path)
    exp = trained / "exp/training_mini_an4_mla"
    pack = Path(shutil.copytree(exp / "model_pack", tmp_path / "pack"))
    with pytest.raises(ValueError, match="trust_user_code=True"):
        InferenceModel.from_packed(pack)
    model = InferenceModel.from_packed(pack, trust_user_code=True)
    expected = texts(exp / "inference_mini_an4/test/text.scp")
    for line in (trained / "data/mini_an4/manifest/test.tsv").read_text().splitlines():
        utterance, audio, _ = line.split("\t")
        samples, _ = soundfile.read(audio, dtype="float32")
        assert model(samples)["text"].split() == expected[utterance].split()
    state = torch.load(next(pack.glob("exp/*/valid.acc.ave_1best.pth")), weights_only=True)
    loaded = model.model.asr_model.state_dict()
    assert all(torch.equal(loaded[k], value.to(loaded[k].dtype)) for k, value in state.items())


@pytest.mark.slow
def test_stages_run_again_only_where_something_has_changed(trained):
    training = "conf/training_mini_an4_mla.yaml"
    result = trained / "exp/training_mini_an4_mla/inference_mini_an4/test/split.0/text.scp"
    statistics = trained / "exp/stats_mini_an4/train/split.0/feats_stats.npz"
    model = trained / "exp/training_mini_an4_mla/valid.acc.ave_1best.pth"
    files = (result, statistics)
    (trained / "conf/inference_wider.yaml").write_text(
        "defaults: [inference_mini_an4]\n"
        "inference_dir: ${exp_dir}/inference_mini_an4\nmodel: {beam_size: 7}\n"
    )
    (trained / "conf/training_longer.yaml").write_text(
        "defaults: [training_mini_an4_mla, _self_]\n"
        "exp_tag: training_mini_an4_mla\n"
        "trainer: {max_epochs: 11}\nmodel: {frontend_conf: {fmin: 20}}\n"
    )
    (trained / "conf/training_other.yaml").write_text(
        "defaults: [training_mini_an4_gqa, _self_]\nexp_tag: training_mini_an4_mla\n"
    )
    before, weights = [file.stat().st_mtime_ns for file in files], model.read_bytes()
    again = words((*PREPARE, "train", "infer"), training)
    assert runs(trained, again) == [None]
    assert [file.stat().st_mtime_ns for file in files] == before
    assert model.read_bytes() == weights
    wider = words(["infer"], training, inference="conf/inference_wider.yaml")
    longer = words(["collect_stats", "train"], "conf/training_longer.yaml")
    other = words(["train"], "conf/training_other.yaml")
    upload = ["HF_TOKEN=hf_none", *words(["upload_model"], training)]
    ended = runs(trained, wider, longer, other, upload)
    assert ended[:2] == [None, None]
    assert all(f.stat().st_mtime_ns > then for f, then in zip(files, before, strict=True))
    assert (trained / "exp/training_mini_an4_mla/step11.ckpt").exists(), "it began anew"
    assert "last.ckpt is of another model: remove" in ended[2]
    assert ended[3].startswith("error: the upload failed: ") and "\n" not in ended[3]


@pytest.mark.slow
def test_the_other_attentions_and_the_other_encoder(tmp_path):
    recipe = copy(tmp_path)
    # gqa differs from mha by its configuration alone, which test_espnet3_data.py compares
    models = {"mha": "conformer", "linear": "branchformer"}
    lines = []
    for attention, encoder in models.items():
        model = f"asr/train_asr_{encoder}_{attention}"
        (recipe / f"conf/training_{attention}.yaml").write_text(
            f"defaults: [base, {{model: {model}}}, mini_an4, _self_]\ntrainer: {{max_epochs: 1}}\n"
        )
        stages = (*PREPARE, "train", "infer", "measure")
        lines.append(words(stages, f"conf/training_{attention}.yaml"))
    assert runs(recipe, *lines) == [None] * len(lines)
    for attention, encoder in models.items():
        exp = recipe / f"exp/training_{attention}"
        config = yaml.safe_load((exp / "config.yaml").read_text())
        assert config["encoder"] == f"kv_{encoder}"
        assert config["encoder_conf"]["attention_type"] == attention
        assert list(texts(exp / "inference_mini_an4/test/text.scp")) == UTTERANCES
        average = torch.load(exp / "valid.acc.ave_1best.pth", weights_only=True)
        (best,) = exp.glob("epoch*_valid.acc.ckpt")
        epoch = torch.load(best, weights_only=False, map_location="cpu")["state_dict"]
        assert all(torch.equal(epoch[key], value) for key, value in average.items())
        assert (exp / "inference_mini_an4/metrics.json").exists()


FAULTS = {
    "no LibriSpeech": (
        words(["create_dataset"], "conf/training.yaml"),
        "LIBRISPEECH is not set: name the directory",
    ),
    "no configuration": (["--stages", "train"], "train runs on the training config"),
    "no such file": (words(["train"], "conf/nowhere.yaml"), "conf/nowhere.yaml: No such file"),
    "broken YAML": (words(["train"], "conf/training_broken.yaml"), "training_broken.yaml"),
    "unknown corpus": (
        words(["create_dataset"], "conf/training_corpus.yaml"),
        "corpus: timit is unknown (allowed: librispeech_100, mini_an4)",
    ),
    "no data": (
        words(["train"], "conf/training_mini_an4_mla.yaml"),
        "train.tsv does not exist: run the create_dataset stage",
    ),
    "no tokenizer": (
        words(["collect_stats"], "conf/training_mini_an4_mla.yaml"),
        "tokens.txt does not exist: run the train_tokenizer stage",
    ),
    "no model": (words(["infer"], "conf/training_mini_an4_mla.yaml"), " does not exist"),
    "no test set": (
        words(["profile"], "conf/training_mini_an4_mla.yaml"),
        "test.tsv does not exist: run the create_dataset stage",
    ),
    "no token": (
        words(["upload_model"], "conf/training_mini_an4_mla.yaml"),
        "no token of Hugging Face was found: run `hf auth login`",
    ),
}


def commands() -> list[list[str]]:
    """Those of docs/espnet3.md that start the recipe, and every training configuration."""
    page = (REPO / "docs/espnet3.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    pages = [shlex.split(line.partition(" run.py ")[2]) for line in lines if " run.py " in line]
    files = sorted(file.name for file in RECIPE.glob("conf/training*.yaml"))
    trainings = [["--stages", "train", "--training_config", f"conf/{file}"] for file in files]
    assert len(pages) == 3 and len(trainings) == 12
    return [[*line, "--dry_run"] for line in pages + trainings]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list:
    """What FAULTS and commands() ended with."""
    recipe = copy(tmp_path_factory.mktemp("ended"))
    (recipe / "conf/training_broken.yaml").write_text("model: {a: [")
    corpus = recipe / "conf/training_corpus.yaml"
    corpus.write_text("defaults: [training, _self_]\ncorpus: timit\n")
    return runs(recipe, *(line for line, _ in FAULTS.values()), *commands())


@pytest.mark.slow
def test_what_a_user_can_mend_is_one_line(ended):
    for (name, (_, said)), text in zip(FAULTS.items(), ended, strict=False):
        assert text is not None and text.startswith("error: ") and said in text, f"{name}: {text}"
        assert len(text.splitlines()) == 1, name


@pytest.mark.slow
def test_the_commands_of_the_page_are_understood(ended):
    assert ended[len(FAULTS) :] == [None] * len(commands())
