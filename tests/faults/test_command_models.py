"""Models and configurations that are damaged, of another kind or moved, in all commands."""

import argparse
import io
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import assert_one_line, run
from espnet2.tasks.lm import LMTask
from small_models import TOKENS, save
from small_sources import Experiment, write_audio

from espnet_kv.bin import asr_inference, asr_inference_streaming, convert, profile, stream
from espnet_kv.errors import UserError
from espnet_kv.espnet.task import ASRTask, TrainingTask
from espnet_kv.profile.subject import Source, Subject
from espnet_kv.streaming.recognizer import StreamingRecognizer

FULL = ["--attention_type", "mla", "--kv_rank", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An experiment whose attention is mha, so that it can be converted too."""
    folder = tmp_path_factory.mktemp("model")
    save(folder, encoder_conf={"attention_type": "mha", "attention_conf": None})
    write_audio(folder / "audio")
    return folder


@pytest.fixture
def copied(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "exp"))


def commands(folder: Path, out: Path) -> dict:
    files = ["--asr_train_config", f"{folder}/config.yaml", "--asr_model_file"]
    files += [f"{folder}/model.pth"]
    data = [*["--data_path_and_name_and_type", f"{folder}/audio/wav.scp,speech,sound"]]
    data += ["--output_dir", str(out), "--num_workers", "0", "--beam_size", "2"]
    quick = ["--lengths", "1", "--repeats", "1", "--chunk_size", "4", "--left_chunks", "2"]
    return {
        "asr_inference": (asr_inference.main, [*files, *data]),
        "asr_inference_streaming": (asr_inference_streaming.main, [*files, *data]),
        "stream": (stream.main, [*files, f"{folder}/audio/u0.wav"]),
        "convert": (convert.main, [*files, "--output_dir", str(out), *FULL]),
        "profile": (profile.main, [*files, *quick, "--output", str(out / "profile.json")]),
    }


NAMES = tuple(commands(Path(), Path()))


def edit(folder: Path, **changes) -> None:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def cut_zip(folder: Path) -> None:
    file = folder / "model.pth"
    file.write_bytes(file.read_bytes()[:5000])


def with_nan(folder: Path) -> None:
    state = torch.load(folder / "model.pth")
    state["encoder.after_norm.weight"][0] = torch.nan
    torch.save(state, folder / "model.pth")


def training_state(folder: Path) -> None:
    torch.save({"model": torch.load(folder / "model.pth"), "optimizers": []}, folder / "model.pth")


def replaced(name: str, content: bytes | None):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)

    return change


FAULTS = {
    "model cut": (cut_zip, "model.pth is not a model file, or it is damaged"),
    "model empty": (replaced("model.pth", b""), "model.pth is not a model file: it is empty"),
    "model is a directory": (replaced("model.pth", None), "model.pth .*directory"),
    "model of NaN": (with_nan, "model.pth: encoder.after_norm.weight holds nan or inf"),
    "training state": (training_state, "model.pth is the state of a training.*valid.acc.ave"),
    "config empty": (replaced("config.yaml", b""), "config.yaml is not a config.yaml"),
    "config of something else": (replaced("config.yaml", b"beam_size: 3"), "names no encoder"),
    "config is a list": (replaced("config.yaml", b"- a"), "config.yaml is not a config.yaml"),
    "config is binary": (replaced("config.yaml", b"\xff\xfe"), "config.yaml is not a config.yaml"),
    "config is a directory": (replaced("config.yaml", None), "config.yaml .*directory"),
    "unknown key": (
        lambda f: edit(f, decoder_conf={"num_blocs": 1}),
        "config.yaml.*num_blocs",
    ),
    "wrong type": (
        lambda f: edit(f, frontend_conf={"n_fft": "many"}),
        "config.yaml builds no model: ",
    ),
    "another attention": (
        lambda f: edit(
            f,
            encoder_conf=yaml.safe_load((f / "config.yaml").read_text())["encoder_conf"]
            | {"linear_units": 16},
        ),
        "model.pth: .*size mismatch.*feed_forward",
    ),
}


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", ["stream", "convert"])
def test_a_broken_model_is_told_by_its_file(name, change, said, copied, tmp_path, capsys):
    change(copied)
    main, arguments = commands(copied, tmp_path / "out")[name]
    one_error(main, arguments, said, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["model cut", "model of NaN", "unknown key", "config is a list"])
@pytest.mark.parametrize("name", ["asr_inference", "asr_inference_streaming", "profile"])
def test_the_other_commands_say_the_same(name, fault, copied, tmp_path, capsys):
    change, said = FAULTS[fault]
    change(copied)
    main, arguments = commands(copied, tmp_path / "out")[name]
    one_error(main, arguments, said, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_that_was_moved_works_from_elsewhere(name, copied, tmp_path, monkeypatch):
    """Its statistics are in the checkpoint; the path in config.yaml leads nowhere."""
    (copied / "feats_stats.npz").unlink()
    edit(copied, normalize_conf={"stats_file": "exp/asr_stats/train/feats_stats.npz"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    main, arguments = commands(copied, tmp_path / "out")[name]
    if name == "profile":  # which takes long: what it loads
        Subject.load(Source(arguments[1], arguments[3]), "cpu", 4, 2)
        return
    ended = run(main, *arguments)
    assert ended.returncode == 0, ended.stderr


def test_a_converted_model_takes_its_statistics_from_the_checkpoint(copied, tmp_path):
    stats = copied / "feats_stats.npz"
    expected = ASRTask.build_model_from_file(copied / "config.yaml", copied / "model.pth")[0]
    stats.unlink()
    main, arguments = commands(copied, tmp_path / "out")["convert"]
    assert main(arguments) == 0
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    rebuilt = ASRTask.build_model(argparse.Namespace(**config))  # as a training reads the file
    for name in ("mean", "std"):
        got, wanted = (getattr(m.normalize, name).float() for m in (rebuilt, expected))
        torch.testing.assert_close(got, wanted)


def test_a_sentencepiece_model_beside_the_config_is_found(copied, tmp_path, monkeypatch):
    train_sentencepiece(copied / "bpe.model")
    edit(copied, token_type="bpe", bpemodel="data/token_list/bpe_unigram30/bpe.model")
    monkeypatch.chdir(tmp_path)
    main, arguments = commands(copied, tmp_path / "out")["asr_inference"]
    assert main(arguments) == 0
    assert (tmp_path / "out/1best_recog/text").read_text().startswith("u0 ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, None) for name in ("asr_inference", "asr_inference_streaming", "stream")),
        *((name, b"x") for name in ("asr_inference", "asr_inference_streaming", "stream")),
        ("convert", None),
    ],
    ids=lambda x: "damaged" if x == b"x" else x or "missing",
)
def test_a_sentencepiece_model_that_is_nowhere(name, content, copied, tmp_path, capsys):
    if content is not None:
        (copied / "bpe.model").write_bytes(content)
    edit(copied, token_type="bpe", bpemodel="data/bpe.model")
    main, arguments = commands(copied, tmp_path / "out")[name]
    one_error(main, arguments, "bpe.model", capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["asr_inference", "asr_inference_streaming", "stream", "profile"])
def test_a_gpu_that_is_not_there_is_no_fault_of_the_model(name, model, tmp_path, capsys):
    main, arguments = commands(model, tmp_path / "out")[name]
    one_error(main, [*arguments, "--ngpu", "1"], "--ngpu 1: no GPU was found", capsys)
    with pytest.raises(UserError, match="no GPU was found"):
        StreamingRecognizer(model / "config.yaml", model / "model.pth", device="cuda")


def test_a_checkpoint_of_torch_before_1_6_starts_a_training(tmp_path):
    source = Experiment(tmp_path / "exp", "kv_conformer")
    old = tmp_path / "old.pth"
    torch.save(source.model.state_dict(), old, _use_new_zipfile_serialization=False)
    config = yaml.safe_load((source.folder / "config.yaml").read_text())
    TrainingTask.build_model(argparse.Namespace(**config | {"init_param": [str(old)]}))
    old.write_bytes(old.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"^init_param .*old.pth is not a model file, or it is dam"):
        TrainingTask.build_model(argparse.Namespace(**config | {"init_param": [str(old)]}))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A language model of the tokens of the ASR model."""
    folder = tmp_path_factory.mktemp("lm")
    conf = LMTask.get_default_config() | {"token_list": TOKENS, "lm": "seq_rnn"}
    conf["lm_conf"] = {"unit": 8, "nlayers": 1}
    torch.save(LMTask.build_model(argparse.Namespace(**conf)).state_dict(), folder / "lm.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    return folder


def lm_of_other_keys(folder: Path) -> None:
    state = torch.load(folder / "lm.pth")
    torch.save({k: v for k, v in state.items() if "decoder" not in k}, folder / "lm.pth")


def lm_of_nan(folder: Path) -> None:
    state = torch.load(folder / "lm.pth")
    torch.save({k: v * torch.nan for k, v in state.items()}, folder / "lm.pth")


LM_FAULTS = {
    "none": (lambda _: None, None),
    "cut": (replaced("lm.pth", b"PK"), "lm.pth is not a model file"),
    "other keys": (lm_of_other_keys, "lm.pth: the checkpoint does not fit .*missing keys: "),
    "NaN": (lm_of_nan, "lm.pth: .* holds nan or inf"),
    "ASR config": (lambda f: edit(f, lm=None), "config.yaml .*names no lm"),
    "unknown key": (lambda f: edit(f, lm_conf={"units": 8}), "config.yaml.*units"),
    "other tokens": (
        lambda f: edit(f, token_list=["<blank>", "<unk>", "B", "A", "<sos/eos>"]),
        "--lm_train_config .*token_list is not that",
    ),
}


@pytest.mark.parametrize(("change", "said"), LM_FAULTS.values(), ids=LM_FAULTS)
def test_a_language_model_is_loaded_as_strictly(
    change, said, language_model, model, tmp_path, capsys
):
    folder = Path(shutil.copytree(language_model, tmp_path / "lm"))
    change(folder)
    main, arguments = commands(model, tmp_path / "out")["asr_inference"]
    arguments += ["--lm_train_config", f"{folder}/config.yaml", "--lm_file", f"{folder}/lm.pth"]
    if said is None:
        assert main(arguments) == 0
    else:
        one_error(main, arguments, said, capsys)


def one_error(main, arguments: list[str], said: str, capsys) -> None:
    """It ends with status 1 and one line, in this process."""
    status = main(arguments)
    ended = argparse.Namespace(returncode=status, stderr=capsys.readouterr().err)
    assert_one_line(ended, said)


def train_sentencepiece(file: Path) -> None:
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ABBA AB", "BAB AB"] * 20),
        model_writer=buffer,
        vocab_size=8,
        minloglevel=2,
    )
    file.write_bytes(buffer.getvalue())
