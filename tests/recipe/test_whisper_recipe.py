"""Whisper through the recipe: fine-tuned and as released, from a file of random weights."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from commands import run as call
from small_recipe import leftovers, make_recipe, run, write_data
from small_training import weights

from espnet_kv.bin import whisper_export_vocabulary
from espnet_kv.config import load_yaml
from espnet_kv.recipe.card import usage

model = pytest.importorskip("whisper.model", reason="openai-whisper is not installed")

DIMS = model.ModelDimensions(80, 1500, 16, 2, 1, 51864, 448, 16, 2, 1)
QUICK = {"num_workers": 0, "use_amp": False, "use_matplotlib": False, "use_tensorboard": False}
EXP = "exp/asr_{}_raw_en_whisper_en_tiny"
FINETUNED, RELEASED = EXP.format("finetune"), EXP.format("zero_shot")


def write_checkpoint(file: Path) -> None:
    """A file as openai-whisper's, of a model too small to know anything."""
    torch.manual_seed(0)
    whisper = model.Whisper(DIMS)
    torch.nn.init.normal_(whisper.decoder.positional_embedding)
    state = {"dims": dataclasses.asdict(DIMS), "model_state_dict": whisper.state_dict()}
    torch.save(state, file)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A recipe that has run, and its options beside it."""
    folder = tmp_path_factory.mktemp("whisper")
    make_recipe(folder)
    write_data(folder / "own", "long", 1, seconds=31)
    write_checkpoint(folder / "tiny.pt")
    for name, more in (("finetune", {"max_epoch": 1, "accum_grad": 1}), ("zero_shot", {})):
        stem = f"tuning/train_asr_whisper_{'tiny_' * (name == 'finetune')}{name}.yaml"
        config = load_yaml(folder / "conf" / stem) | QUICK | more
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    options = [
        *("--corpus", "kaldi", "--train_set", "own/train", "--valid_set", "own/dev"),
        *("--test_sets", "own/test own/long", "--token_type", "whisper_en"),
        *("--whisper_model", "tiny.pt"),
        *("--nj", "1", "--inference_nj", "1", "--ngpu", "0", "--speed_perturb_factors", ""),
        *("--asr_config", "finetune.yaml zero_shot.yaml"),
        *("--inference_args", "--beam_size 2 --maxlenratio -12"),
    ]
    (folder / "options.json").write_text(json.dumps(options))
    code, out, err = run(folder, *options, "--stop_stage", "13")
    assert code == 0, out + err
    assert not leftovers(folder)
    return folder


def options_of(place: Path) -> list[str]:
    return json.loads((place / "options.json").read_text())


def test_the_token_list_is_that_of_espnets_command(place, tmp_path):
    ended = call(
        whisper_export_vocabulary.main,
        *("--whisper_model", "whisper_en", "--output", str(tmp_path / "tokens.txt")),
    )
    assert ended.returncode == 0, ended.stderr
    listed = (place / "data/en_token_list/whisper_en/tokens.txt").read_bytes()
    assert listed == (tmp_path / "tokens.txt").read_bytes()
    assert listed.count(b"\n") == DIMS.n_vocab
    shapes = (place / "exp").glob("asr_stats_raw_en_whisper_en_*/train/text_shape.whisper_en")
    assert all(line.endswith(f",{DIMS.n_vocab}") for line in next(shapes).read_text().splitlines())


def test_without_epochs_the_weights_are_those_of_the_file(place):
    given = torch.load(place / "tiny.pt", weights_only=True)["model_state_dict"]
    for part in ("encoder", "decoder"):
        for exp, equal in ((RELEASED, True), (FINETUNED, False)):
            saved = weights(place / exp / "valid.acc.ave.pth")
            names = [name for name in given if name.startswith(f"{part}.") and "mask" not in name]
            pairs = [(saved[name.replace(".", f".{part}s.", 1)], given[name]) for name in names]
            assert all(torch.equal(*pair) for pair in pairs) is equal


@pytest.mark.parametrize("exp", [FINETUNED, RELEASED])
def test_texts_are_cleaned_before_they_are_trained_on_and_scored(place, exp):
    from espnet2.text.cleaner import TextCleaner

    config = load_yaml(place / exp / "config.yaml")
    assert (config["cleaner"], config["bpemodel"]) == ("whisper_en", "whisper_en")
    assert config["normalize"] is None
    (decoded,) = place.glob(f"{exp}/decode_asr_whisper_*/test")
    clean = TextCleaner("whisper_en")
    for side, file in (("ref", place / "own/test/text"), ("hyp", decoded / "text")):
        lines = dict(line.partition(" ")[::2] for line in file.read_text().splitlines())
        expected = {key: " ".join(clean(text).split()) for key, text in lines.items()}
        trn = (decoded / f"score_wer/{side}.trn").read_text().splitlines()
        found = dict(re.fullmatch(r"(.*?) ?\((\S+)\)", line).groups()[::-1] for line in trn)
        assert found == expected
    assert not (decoded / "score_ter").exists()


def test_a_text_of_several_lines_becomes_one(place):
    from espnet_kv.espnet.inference import Hypothesis, Speech2Text

    exp = place / RELEASED
    files = {"asr_train_config": exp / "config.yaml", "asr_model_file": exp / "valid.acc.ave.pth"}
    recognizer = Speech2Text(**{key: str(file) for key, file in files.items()}, ctc_weight=0.0)
    tokens = ["Ġone", "Ċ", "Ġtwo", "Ċ"]
    ids = recognizer.converter.tokenizer.tokenizer.convert_tokens_to_ids(tokens)
    sos, eos = recognizer.asr_model.sos, recognizer.asr_model.eos
    hypothesis = Hypothesis(yseq=torch.tensor([sos, *ids, eos]))
    ((text, found, *_),) = recognizer._hyps_to_results([hypothesis])
    assert (text, found) == ("one two", tokens)


def test_the_card_of_a_pack_does_not_stream(place):
    said = usage(place / RELEASED, "whisper.zip")
    assert "pip install 'espnet_kv[whisper]'" in said
    assert "from espnet_kv.bin.asr_inference import Speech2Text" in said
    assert "Streaming" not in said and "Streaming" in usage(place / "no_whisper", "other.zip")


def test_a_second_run_does_nothing(place):
    code, out, err = run(place, *options_of(place), "--stop_stage", "13", "--dry_run", "true")
    assert code == 0, out + err
    assert "would run" not in out.replace("would run: always done", "")


@pytest.mark.parametrize("exp", [FINETUNED, RELEASED])
def test_audio_beyond_the_window_is_decoded_in_parts(place, exp):
    (decoded,) = place.glob(f"{exp}/decode_asr_whisper_*/long")
    (ids,) = (decoded / "token_int").read_text().splitlines()
    primer = ids.split()[1]
    assert ids.split().count(primer) == 2
    (log,) = decoded.glob("logdir/*.log")
    assert "long0: 31.00 s of audio are more than the 30 s that Whisper encodes" in log.read_text()
