"""The recipe for ESPnet3: corpora, configurations, errors, and results that it makes anew."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import yaml
from omegaconf import OmegaConf

from espnet_kv.errors import UserError

REPO = Path(__file__).parents[2]
RECIPE = REPO / "egs3/librispeech_100_kv/asr"
SETS = ("train-clean-100", "dev-clean", "dev-other", "test-clean", "test-other")
PAIRS = [(e, a) for e in ("conformer", "branchformer") for a in ("mha", "gqa", "mla", "linear")]


@pytest.fixture(scope="module")
def data() -> ModuleType:
    """The recipe's dataset module, as ESPnet3 loads it."""
    from espnet3.components.data.dataset_module import load_dataset_module

    return load_dataset_module(recipe_dir=RECIPE)


@pytest.fixture
def librispeech(tmp_path) -> Path:
    """A copy of LibriSpeech with two utterances in each set."""
    root = tmp_path / "corpora/LibriSpeech"
    for number, name in enumerate(SETS):
        chapter = root / name / f"{number}/7"
        chapter.mkdir(parents=True)
        lines = []
        for utterance in (f"{number}-7-0001", f"{number}-7-0000"):
            soundfile.write(chapter / f"{utterance}.flac", np.full(800, 0.1 * number), 16000)
            lines.append(f"{utterance} WORDS OF {utterance[-4:]}\n")
        (chapter / f"{number}-7.trans.txt").write_text("".join(lines))
    return root


def build(data: ModuleType, corpus: str, folder: Path, **options) -> Path:
    """Run the steps that ESPnet3's create_dataset runs; the directory of the manifests."""
    arguments = {"corpus": corpus, "data_dir": str(folder), "func": "of the defaults", **options}
    builder = data.DatasetBuilder()
    if not builder.is_source_prepared(**arguments):
        builder.prepare_source(**arguments)
    if not builder.is_built(**arguments):
        builder.build(**arguments)
    assert builder.is_source_prepared(**arguments) and builder.is_built(**arguments)
    return folder / "manifest"


@pytest.mark.parametrize("given", ["the directory", "the one above", "an argument"])
def test_librispeech_is_read_where_it_is(given, data, librispeech, tmp_path, monkeypatch):
    named = librispeech.parent if given == "the one above" else librispeech
    options = {"source_dir": str(named)} if given == "an argument" else {}
    monkeypatch.setenv("LIBRISPEECH", "" if options else str(named))
    manifests = build(data, "librispeech_100", tmp_path / "data", **options)
    for number, name in enumerate(SETS):
        found = data.Dataset(str(manifests / f"{name}.tsv"), utt_ids=True)
        assert len(found) == 2
        assert found[0]["utt_id"] == f"{number}-7-0000" and found[1]["text"] == "WORDS OF 0001"
        assert found[0]["speech"].dtype == np.float32
        np.testing.assert_allclose(found[0]["speech"], 0.1 * number, atol=1e-4)
    assert set(data.Dataset(str(manifests / "dev-clean.tsv"))[0]) == {"speech", "text"}


def test_what_was_built_needs_no_librispeech(data, librispeech, tmp_path, monkeypatch):
    build(data, "librispeech_100", tmp_path / "data", source_dir=str(librispeech))
    monkeypatch.delenv("LIBRISPEECH", raising=False)
    build(data, "librispeech_100", tmp_path / "data")


def damage(root: Path, kind: str) -> None:
    transcripts = root / "test-other/4/7/4-7.trans.txt"
    if kind == "no set":
        (root / "test-other").rename(root / "elsewhere")
    elif kind == "no audio":
        (root / "test-other/4/7/4-7-0001.flac").unlink()
    elif kind == "no transcripts":
        transcripts.unlink()
    else:
        transcripts.write_text("4-7-0001\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no set", "lacks test-other: unpack"),
        ("no audio", "test-other: 4-7-0001: .*4-7-0001.flac does not exist"),
        ("no transcripts", r"test-other holds no \*.trans.txt"),
        ("no words", "4-7.trans.txt: '4-7-0001' has no transcript"),
    ],
)
def test_a_corpus_that_lacks_something_is_refused(kind, said, data, librispeech, tmp_path):
    damage(librispeech, kind)
    with pytest.raises(UserError, match=said):
        build(data, "librispeech_100", tmp_path / "data", source_dir=str(librispeech))


def test_mini_an4_is_that_of_espnet(data, tmp_path):
    manifests = build(data, "mini_an4", tmp_path / "data")
    found = {
        name: data.Dataset(str(manifests / f"{name}.tsv")) for name in ("train", "valid", "test")
    }
    texts = {name: [item["text"] for item in items] for name, items in found.items()}
    assert texts["valid"] == ["YES"]
    assert texts["test"][1] == "OCTOBER TWENTY FOUR NINETEEN SEVENTY"
    assert sorted(texts["train"])[0] == "ELEVEN SEVENTEEN FIFTY ONE" and len(texts["train"]) == 4
    assert len(found["test"][1]["speech"]) == 36800  # sample_count of its header


def test_audio_that_cannot_be_read_is_named(data, tmp_path):
    (tmp_path / "a.flac").write_bytes(b"no audio")
    (tmp_path / "a.tsv").write_text(f"utt\t{tmp_path}/a.flac\tWORDS\n")
    with pytest.raises(UserError, match=r"utt: .*a\.flac cannot be read"):
        data.Dataset(str(tmp_path / "a.tsv"))[0]


@pytest.mark.parametrize(("encoder", "attention"), PAIRS)
def test_a_configuration_trains_the_model_of_conf(encoder, attention):
    from espnet3.utils.config_utils import load_and_merge_config

    name = "training" if (encoder, attention) == ("conformer", "mha") else None
    file = RECIPE / "conf" / f"{name or f'training_{encoder}_{attention}'}.yaml"
    config = load_and_merge_config(file, "training.yaml", "egs3.TEMPLATE.esp2_asr")
    model = OmegaConf.to_container(config.model)
    expected = yaml.safe_load(
        (REPO / f"conf/train_asr_{encoder}_{attention}.yaml").read_text(encoding="utf-8")
    )
    assert {key: model[key] for key in expected} == expected
    assert config.exp_dir == f"./exp/{file.stem}"
    assert (config.optimizer.lr, config.scheduler.warmup_steps) == (0.002, 15000)
    assert model["normalize_conf"] == {
        "stats_file": "./exp/stats_librispeech_100/train/feats_stats.npz"
    }


@pytest.fixture
def src(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a module of the recipe's src/."""
    monkeypatch.syspath_prepend(RECIPE)
    yield lambda name: importlib.import_module(f"src.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]


def fail(error: BaseException) -> None:
    raise error


def fail_in_espnet3() -> None:
    from espnet3.contract.inference import load_inference_contract

    load_inference_contract({"inputs": {}, "outputs": {}})


def wrapped() -> None:
    try:
        fail(UserError("a.yaml: kv_rank: 0\nis not allowed"))
    except UserError as error:
        raise RuntimeError("Error in call to target") from error


ENDS = {
    "a user's": (lambda: fail(UserError("a.yaml: no")), "error: a.yaml: no"),
    "a wrapped one": (wrapped, "error: a.yaml: kv_rank: 0 is not allowed"),
    "a file's": (lambda: Path("nowhere").read_text(), "error: nowhere: No such file"),
    "a refusal of ESPnet3": (fail_in_espnet3, "error: inference contract.inputs must be"),
    "Ctrl-C": (lambda: fail(KeyboardInterrupt()), 130),
    "a fault of the program": (lambda: fail(RuntimeError("what")), None),
    "another": (lambda: {}["key"], None),
}


@pytest.mark.parametrize(("function", "said"), ENDS.values(), ids=ENDS)
def test_errors_that_a_user_can_mend_are_one_line(function, said, src):
    with pytest.raises((SystemExit, RuntimeError, KeyError)) as raised:
        src("plain").plainly(function)()
    if said is None:
        assert raised.type is not SystemExit
    else:
        assert str(raised.value.code).startswith(str(said))


CHANGES = {
    "nothing": lambda config: None,
    "the search": lambda config: config.model.update(beam_size=7),
    "the batch": lambda config: config.update(batch_size=1),
    "the model": lambda config: Path(config.model.asr_model_file).write_text("other"),
    "the test set": lambda config: Path(config.dataset.test[0].data_src_args.manifest).write_text(
        "other"
    ),
    "another set": lambda config: config.dataset.test.append(
        {"name": "b", "data_src_args": {"manifest": "b.tsv"}}
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_results_are_kept_until_they_are_of_something_else(changed, src, tmp_path, capsys):
    renew_results = src("fresh").renew_results
    for name in ("model.pth", "a.tsv"):
        (tmp_path / name).write_text(name)
    config = OmegaConf.create(
        {
            "inference_dir": f"{tmp_path}/inference",
            "batch_size": 4,
            "model": {"asr_model_file": f"{tmp_path}/model.pth", "beam_size": 5},
            "dataset": {
                "test": [{"name": "a", "data_src_args": {"manifest": f"{tmp_path}/a.tsv"}}]
            },
        }
    )
    renew_results(config)
    result = tmp_path / "inference/a/text.scp"
    result.write_text("utt WORDS\n")
    CHANGES[changed](config)
    renew_results(config)
    kept = changed in ("nothing", "another set")
    assert result.exists() == kept
    assert ("is made again" in capsys.readouterr().out) == (not kept)
