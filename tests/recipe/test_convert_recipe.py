"""run.sh --convert_from: a sweep of conversions, fine-tuned, decoded, scored and reported."""

import json
import re
from pathlib import Path

import pytest
import yaml
from small_sources import LETTERS, STREAMING, Experiment, write_audio

from espnet_kv.convert.record import read_record
from espnet_kv.errors import UserError
from espnet_kv.recipe.__main__ import main
from espnet_kv.recipe.conversion import plan
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse

REPO = Path(__file__).parents[2]
MLA = ["--attention_type", "mla", "--kv_rank", "4"]


@pytest.fixture(autouse=True)
def _recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(REPO / "conf")


def options(*words: str, source: str = "exp/asr_mha"):
    return parse(["--convert_from", source, *words])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["mla", "--kv_rank", "16 32"], ["asr_mha_mla_r16", "asr_mha_mla_r32"]),
        (["mla", "--target_compression", "0.75"], ["asr_mha_mla_c0.75"]),
        (["gqa", "--num_kv_heads", "1"], ["asr_mha_gqa_g1"]),
        (["linear"], ["asr_mha_linear_hedgehog"]),
        (["linear", "--feature_map", "elu"], ["asr_mha_linear_elu"]),
        (
            ["mla", "--kv_rank", "4", "--convert_parts", "decoder_self,decoder_cross"],
            ["asr_mha_mla_r4_decoder_self_decoder_cross"],
        ),
        (["mla", "--kv_rank", "4", "--convert_seed", "2"], ["asr_mha_mla_r4_seed2"]),
        (["mla", "--kv_rank", "4", "--calibration_minutes", "0"], ["asr_mha_mla_r4_plain"]),
    ],
    ids=lambda value: " ".join(value[:1]),
)
def test_experiments_are_named_after_what_is_done(words, names):
    assert [c.experiment.name for c in plan(options("--attention_type", *words))] == names


def test_later_stages_go_by_the_experiments():
    tuning = ["--finetune_epochs", "2", "--finetune_iters", "9", "--finetune_control", "true"]
    args = options(*MLA, *tuning)
    found = [Layout(args).asr_exp(config) for config in args.asr_config]
    assert found == [
        Path("exp/asr_mha"),
        Path("exp/asr_mha_mla_r4"),
        Path("exp/asr_mha_mla_r4_ft2x9"),
        Path("exp/asr_mha_ft2x9"),
    ]
    args = options(*MLA, "--finetune_epochs", "1", "--finetune_lr", "0.001", source="other/mha")
    names = [Layout(args).asr_exp(config).name for config in args.asr_config]
    assert names == ["asr_mha_mla_r4", "asr_mha_mla_r4_ft1_lr0.001"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--attention_type", "mha"], "--attention_type mha: --convert_from needs one of mla"),
        ([], "--convert_from needs one of mla, gqa, linear"),
        (["--attention_type", "mla"], "give --kv_rank"),
        ([*MLA, "--num_kv_heads", "2"], "--num_kv_heads: --attention_type mla does not take it"),
        ([*MLA, "--finetune_control", "true"], "give --finetune_epochs"),
        ([*MLA, "--finetune_epochs", "-1"], "--finetune_epochs: '-1' is not a whole number"),
        ([*MLA, "--asr_tag", "x"], "--asr_tag: --convert_from goes by the config of the source"),
        ([*MLA, "--asr_config", "conf/x.yaml"], "--asr_config: --convert_from goes by"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        options(*words)


@pytest.mark.parametrize(
    "words", [MLA, ["--kv_rank", "4"], ["--finetune_epochs", "1"]], ids=lambda words: words[0]
)
def test_options_without_a_source_are_refused(words):
    with pytest.raises(UserError, match=f"{words[0]}: goes with --convert_from"):
        parse(words)


def test_a_source_that_is_not_there_is_named(capsys):
    words = ["--convert_from", "exp/none", *MLA, "--calibration_minutes", "0", "--stage", "11"]
    assert main(words) == 1
    assert "exp/none/config.yaml does not exist" in capsys.readouterr().err


@pytest.fixture
def source(tmp_path) -> Experiment:
    """exp/asr_mha, with the data that it claims to be trained on."""
    dump = tmp_path / "dump/raw"
    for name in ("train", "test"):
        write_audio(dump / name)
        keys = range(len(LETTERS))
        text = "".join(f"u{n} {LETTERS[n].replace('_', '')}\n" for n in keys)
        (dump / name / "text").write_text(text)
        (dump / name / "utt2spk").write_text("".join(f"u{n} u{n}\n" for n in keys))
        (dump / name / "spk2utt").write_text("".join(f"u{n} u{n}\n" for n in keys))
    shapes = {"speech_shape": 16000, "text_shape": "4,5"}
    for name, shape in shapes.items():
        (tmp_path / name).write_text("".join(f"u{n} {shape}\n" for n in keys))
    paths = [["dump/raw/train/wav.scp", "speech", "sound"], ["dump/raw/train/text", "text", "text"]]
    return Experiment(
        Path("exp/asr_mha"),
        "kv_conformer",
        STREAMING,
        num_workers=0,
        optim="adam",
        optim_conf={"lr": 0.002},
        scheduler="warmuplr",
        scheduler_conf={"warmup_steps": 9},
        batch_type="numel",
        batch_bins=100000,
        max_epoch=70,
        use_matplotlib=False,
        **{f"{mode}_data_path_and_name_and_type": paths for mode in ("train", "valid")},
        **{f"{mode}_shape_file": list(shapes) for mode in ("train", "valid")},
    )


RECIPE = [
    *["--convert_from", "exp/asr_mha", "--audio_format", "wav", "--token_type", "char"],
    *["--train_set", "train", "--valid_set", "train", "--test_sets", "test"],
    *["--speed_perturb_factors", "", "--calibration_minutes", "0.1", "--inference_nj", "1"],
    *["--inference_args", "--beam_size 1 --ctc_weight 0.7", "--ngpu", "0", "--train_nj", "2"],
]


@pytest.mark.slow
def test_convert_fine_tune_decode_score(source, capsys):
    tuning = ["--finetune_epochs", "1", "--finetune_iters", "1", "--finetune_control", "true"]
    command = [*RECIPE, *MLA, *tuning, "--stage", "10", "--stop_stage", "13"]
    assert main(command) == 0, capsys.readouterr().err
    names = ["asr_mha", "asr_mha_mla_r4", "asr_mha_mla_r4_ft1x1", "asr_mha_ft1x1"]
    decoded = {name: list(Path("exp", name).glob("decode_*/test/score_wer")) for name in names}
    assert all(len(found) == 1 for found in decoded.values()), decoded

    converted, tuned = Path("exp/asr_mha_mla_r4"), Path("exp/asr_mha_mla_r4_ft1x1")
    record = read_record(converted)
    assert set(record["wer"]) == {"before", "after", "fine_tuned", "control"}
    assert "not converted, same fine-tuning" in (converted / "conversion.md").read_text()
    assert record["source"]["experiment"] == "exp/asr_mha"
    assert "--convert_from" in json.loads((converted / "run.json").read_text())["command"]
    assert read_record(tuned)["finetune"]["start"] == str(converted / "valid.acc.ave.pth")
    assert "then fine-tuned: 1 epochs of 1 batches" in (tuned / "conversion.md").read_text()
    for name in names[2:]:
        trained = yaml.safe_load(Path("exp", name, "config.yaml").read_text())
        assert trained["optim_conf"]["lr"] == pytest.approx(0.0002)
        assert (trained["scheduler"], trained["max_epoch"]) == (None, 1)
        assert trained["num_iters_per_epoch"] == 1
    kinds = [
        yaml.safe_load(Path("exp", name, "config.yaml").read_text())["encoder_conf"]
        for name in names
    ]
    assert [kind.get("attention_type", "mha") for kind in kinds] == ["mha", "mla", "mla", "mha"]

    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    # a conversion, two fine-tunings, four decodings, four scores
    assert out.count("is up to date") == 11 and "done (1/" not in out
    assert main([*command, "--calibration_minutes", "0.05"]) == 1
    assert "--calibration_minutes was 0.1, is 0.05" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_without_training_data_are_fine_tuned_on_the_sets_of_the_recipe(source, capsys):
    """Such as those of Whisper, as released."""
    file = Path("exp/asr_mha/config.yaml")
    config = yaml.safe_load(file.read_text())
    kept = {key: value for key, value in config.items() if not key.startswith(("train_", "valid_"))}
    file.write_text(yaml.safe_dump(kept))
    tokens = Path("data/en_token_list/char/tokens.txt")
    tokens.parent.mkdir(parents=True)
    tokens.write_text("\n".join(config["token_list"]) + "\n")
    tuning = ["--finetune_epochs", "1", "--finetune_iters", "1", "--finetune_control", "true"]
    command = [*RECIPE, *MLA, *tuning, "--calibration_minutes", "0"]
    assert main([*command, "--stage", "10", "--stop_stage", "11"]) == 0, capsys.readouterr().err
    for name in ("asr_mha_ft1x1", "asr_mha_mla_r4_plain_ft1x1"):
        trained = yaml.safe_load(Path("exp", name, "config.yaml").read_text())
        paths = trained["train_data_path_and_name_and_type"]
        assert paths[0] == ["dump/raw/train/wav.scp", "speech", "sound"]
        assert Path(trained["train_shape_file"][0]).is_file()
        assert Path("exp", name, "valid.acc.ave.pth").is_file()


def test_what_the_source_was_trained_on_must_be_there(source, capsys):
    Path("text_shape").unlink()
    stage = ["--stage", "11", "--stop_stage", "11", "--finetune_epochs", "1"]
    assert main([*RECIPE, *MLA, *stage]) == 1
    assert "text_shape does not exist, but exp/asr_mha_mla_r4/config.yaml was trained on it" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*MLA[:3], "four"], "argument --kv_rank: invalid int value: 'four'"),
        ([*MLA, "--convert_parts", "encoder lm"], "'encoder,lm' is not a list of encoder"),
        ([*MLA, "--inference_asr_model", "x.pth"], "exp/asr_mha/x.pth does not exist"),
    ],
    ids=["rank", "parts", "model"],
)
def test_wrong_values_are_told_before_anything_is_done(words, told, source, capsys):
    assert main([*RECIPE, *words, "--stage", "11", "--stop_stage", "11"]) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert [path.name for path in Path("exp").iterdir()] == ["asr_mha"]
