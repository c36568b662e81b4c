"""What reruns when an option of run.sh changes: every option stands in one table here."""

from pathlib import Path

import pytest
from forecasts import RECIPE, pretend_done, recipe_place, stages

from espnet_kv.config import load_yaml
from espnet_kv.recipe.options import NEUTRAL, PLACES, parse, parser

GIVEN = ["--corpus", "synth", "--use_lm", "true", "--use_ngram", "true"]
GIVEN += ["--speed_perturb_factors", "1.0 1.1", "--nj", "1", "--inference_nj", "1"]
MHA, MLA = (f"conf/train_asr_conformer_{name}.yaml" for name in ("mha", "mla"))

EVERYTHING = {*range(1, 13), 13, 14}
FROM_FORMAT = EVERYTHING - {1, 2, 5}
FROM_TRAINING_AUDIO = EVERYTHING - {1, 5}
TOKENS_ON = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14}

# option -> (another value, the stages that rerun); an option without a line fails the test
RERUNS = {
    # where and how it runs
    "stage": ("1", set()),
    "stop_stage": ("15", set()),
    "nj": ("2", set()),
    "inference_nj": ("2", set()),
    "train_nj": ("2", set()),
    "ngpu": ("0", {14}),  # times and memory are those of the device
    "gpu_inference": ("false", set()),
    "cluster": ("local", set()),
    "cluster_config": ("conf/cluster/local.yaml", set()),
    "dry_run": ("true", set()),
    "allow_pipes": ("true", set()),
    "download_dir": ("elsewhere", set()),
    "results": ("other.md", set()),
    # other outputs: nothing there has been made
    "dumpdir": ("dump2", {3, 4}),  # what comes after it knows it by its content
    "expdir": ("exp2", {6, 7, 8, 9, 10, 11, 12, 13, 14}),
    "datadir": ("data2", EVERYTHING),
    "lang": ("de", {5, 6, 7, 8, 10, 11, 12, 13, 14}),
    "asr_exp": ("exp/mine", {11, 12, 13, 14}),
    "asr_stats_dir": ("exp/mine", {10, 11, 12, 13, 14}),
    "lm_exp": ("exp/mine", {7, 8, 12, 13}),
    "lm_stats_dir": ("exp/mine", {6, 7, 8, 12, 13}),
    "ngram_exp": ("exp/mine", {9, 12, 13}),
    "lm_tag": ("x", {7, 8, 12, 13}),
    "asr_tag": ("x", {11, 12, 13, 14}),
    "inference_tag": ("x", {12, 13}),
    # data
    "corpus": ("librispeech_100", EVERYTHING),
    "corpus_dir": ("tree", set()),  # synth is made, not read; see test_another_copy
    "librispeech": ("tree", set()),
    "train_set": ("other_set", EVERYTHING - {1}),
    "valid_set": ("other_set", EVERYTHING - {1, 2, 5, 9}),
    "test_sets": ("test_clean other_set", {3, 8, 12, 13}),
    "synth_train": ("3", EVERYTHING),
    "synth_dev": ("3", EVERYTHING),
    "synth_test": ("3", EVERYTHING),
    "synth_seed": ("3", EVERYTHING),
    "digits_train": ("3", set()),
    "digits_dev": ("3", set()),
    "digits_test": ("3", set()),
    "digits_seed": ("3", set()),
    "speed_perturb_factors": ("0.9 1.0", FROM_TRAINING_AUDIO),
    "audio_format": ("wav", FROM_FORMAT),
    "fs": ("8000", FROM_FORMAT),
    "min_wav_duration": ("0.5", FROM_FORMAT - {3}),
    "max_wav_duration": ("5", FROM_FORMAT - {3}),
    # tokens
    "token_type": ("char", TOKENS_ON),
    "nbpe": ("80", TOKENS_ON),
    "bpemode": ("bpe", TOKENS_ON),
    "bpe_char_cover": ("0.99", TOKENS_ON),
    "cleaner": ("whisper_en", None),  # goes with Whisper's tokens: see test_whisper_options.py
    "whisper_model": ("tiny.en", None),  # goes with Whisper models
    # language models
    "use_lm": ("false", {12, 13}),
    "lm_config": ("conf/train_lm_transformer.yaml", {7, 8, 12, 13}),
    "lm_args": ("--max_epoch 3", {7, 8, 12, 13}),
    "inference_lm": ("valid.loss.best.pth", {8, 12, 13}),
    "use_ngram": ("false", {12, 13}),
    "ngram_num": ("3", {9, 12, 13}),
    # models
    "asr_config": (MLA, {11, 12, 13, 14}),
    "overlay": ("conf/overlays/medium.yaml", {11, 12, 13, 14}),  # has the same front end
    "asr_args": ("--max_epoch 3", {11, 12, 13, 14}),
    "feats_normalize": ("utterance_mvn", {11, 12, 13, 14}),
    "use_streaming": ("true", None),  # goes without a language model: see below
    "inference_config": ("conf/decode_asr.yaml", {12, 13, 14}),
    "inference_args": ("--beam_size 2", {12, 13}),
    "inference_asr_model": ("valid.acc.best.pth", {12, 13, 14}),
    "profile_args": ("--utterances 5", {14}),
    # packing and upload: see test_packing.py
    "skip_packing": ("false", {16}),
    "skip_upload_hf": ("false", None),  # needs --hf_repo
    "hf_repo": ("me/model", None),  # depends on nothing unless there is an upload
    # export to ONNX: see test_export_stage.py
    "skip_export": ("false", {18}),
    "export_args": ("--chunk_size 8", None),  # depends on nothing unless there is an export
    # conversions: see test_conversions
    "convert_from": ("exp/source", None),
    "attention_type": ("mla", None),
    "kv_rank": ("8", None),
    "num_kv_heads": ("1", None),
    "feature_map": ("elu", None),
    "target_compression": ("0.5", None),
    "convert_parts": ("decoder_self", set()),
    "calibration_minutes": ("1", set()),
    "convert_seed": ("1", set()),
    "finetune_epochs": ("1", None),
    "finetune_iters": ("1", set()),
    "finetune_lr": ("1", set()),
    "finetune_control": ("true", None),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    return recipe_place(tmp_path, monkeypatch)


@pytest.fixture
def done(here) -> None:
    pretend_done(*GIVEN)
    assert stages(*GIVEN) == set()


def test_every_option_has_its_line():
    options = {action.dest for action in parser()._actions} - {"help"}
    assert options == RERUNS.keys()


def test_what_no_step_declares_is_said_to_be_neutral_or_a_place():
    nothing = {name for name, (_, stages) in RERUNS.items() if stages == set()}
    of_other_corpora = {"corpus_dir", "librispeech"} | {n for n in RERUNS if "digits_" in n}
    without_conversion = {"convert_parts", "calibration_minutes", "convert_seed"}
    without_conversion |= {"finetune_iters", "finetune_lr"}
    assert nothing - of_other_corpora - without_conversion == set(NEUTRAL)
    assert set(PLACES) <= RERUNS.keys()


@pytest.mark.parametrize("option", [name for name, (_, s) in RERUNS.items() if s is not None])
def test_a_change_reruns_what_depends_on_it_and_nothing_else(done, option):
    value, expected = RERUNS[option]
    assert stages(*GIVEN, f"--{option}", value) == expected


def test_streaming_is_another_decoding(here):
    options = ("--corpus", "synth", "--stop_stage", "13")
    pretend_done(*options)
    assert stages(*options) == set()
    assert stages(*options, "--use_streaming", "true") == {12, 13, 14}


@pytest.mark.parametrize(
    "asr_args", ["--frontend_conf n_mels=40", "--frontend_conf=n_mels=40", "--frontend s3prl"]
)
def test_another_front_end_has_statistics_of_its_own(done, asr_args):
    assert stages(*GIVEN, f"--asr_args={asr_args}") == {10, 11, 12, 13, 14}


def test_another_copy_of_a_corpus_is_other_data_and_none_is_the_last_one(here):
    pretend_done("--corpus", "librispeech_100", "--corpus_dir", "copy")
    assert stages("--corpus", "librispeech_100") == set()
    assert 1 in stages("--corpus", "librispeech_100", "--librispeech", "other")


@pytest.mark.parametrize("part", ["train", "dev", "test", "seed"])
def test_sizes_of_the_digits(here, part):
    pretend_done("--corpus", "digits")
    assert stages("--corpus", "digits") == set()
    assert 1 in stages("--corpus", "digits", f"--digits_{part}", "7")


CONVERSION = ["--corpus", "synth", "--convert_from", "source/asr_x", "--attention_type", "mla"]
CONVERSION += ["--kv_rank", "8", "--finetune_epochs", "2", "--finetune_control", "true"]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("kv_rank", "4", {11, 12, 13, 14}),
        ("convert_parts", "decoder_self", {11, 12, 13, 14}),
        ("calibration_minutes", "1", {11, 12, 13, 14}),
        ("convert_seed", "1", {11, 12, 13, 14}),
        ("target_compression", "0.5", {11, 12, 13, 14}),
        ("finetune_epochs", "3", {11, 12, 13, 14}),
        ("finetune_iters", "3", {11, 12, 13, 14}),
        ("finetune_lr", "0.5", {11, 12, 13, 14}),
        ("asr_args", "--max_epoch 3", {11, 12, 13, 14}),
    ],
)
def test_conversions(here, option, value, expected):
    source = Path("source/asr_x")
    source.mkdir(parents=True)
    (source / "config.yaml").write_text((RECIPE / MHA).read_text())
    pretend_done(*CONVERSION)
    assert stages(*CONVERSION) == set()
    given = CONVERSION
    assert stages(*given, f"--{option}", value) == expected


class TestContentOfFiles:
    """The same options, but other content behind them."""

    @pytest.mark.parametrize(
        ("file", "expected"),
        [
            ("data/train_clean_100/text", EVERYTHING - {1}),
            ("data/dev/text", EVERYTHING - {1, 2, 5, 9}),
            ("data/test_clean/wav.scp", {3, 8, 12, 13, 14}),
            ("exp/asr/valid.acc.ave.pth", {12, 13, 14}),
            ("exp/asr/config.yaml", {12, 13, 14}),
            ("exp/lm/valid.loss.ave.pth", {8, 12, 13}),
            ("exp/lm/config.yaml", {8, 12, 13}),
            ("exp/ngram/4gram.bin", {12, 13}),
            ("exp/asr/bpe.model", {12, 13}),
            ("dump/raw/train_clean_100_sp/text", {6, 7, 8, 9, 12, 13}),
        ],
    )
    def test_is_seen(self, here, file, expected):
        given = (*GIVEN, "--asr_tag", "asr", "--lm_tag", "lm")
        path = Path(file.replace("exp/asr", "exp/asr_asr").replace("exp/lm", "exp/lm_lm"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("before")
        pretend_done(*given)
        assert stages(*given) == set()
        path.write_text(path.read_text().replace("u.wav", "v.wav") + "u2 more\n")
        assert stages(*given) == expected

    def test_of_audio_is_seen(self, done):
        Path("u.wav").write_bytes(b"other")
        assert stages(*GIVEN) == EVERYTHING - {1, 5}

    @pytest.mark.parametrize(
        ("option", "file", "expected"),
        [
            ("asr_config", MHA, {11, 12, 13, 14}),
            ("overlay", "conf/overlays/small.yaml", {11, 12, 13, 14}),
            ("lm_config", "conf/train_lm_small.yaml", {7, 8, 12, 13}),
            ("inference_config", "conf/decode_asr_fast.yaml", {12, 13, 14}),
        ],
    )
    def test_of_a_configuration_is_seen(self, here, option, file, expected):
        Path("own.yaml").write_text(Path(file).read_text())
        given = (*GIVEN, f"--{option}", "own.yaml")
        pretend_done(*given)
        assert stages(*given) == set()
        key = {"inference_config": "penalty: 0.5", "lm_config": "grad_clip: 4.0"}
        before = load_yaml(Path("own.yaml"))
        with Path("own.yaml").open("a") as own:
            own.write(f"\n{key.get(option, 'grad_clip: 4.25')}\n")
        assert load_yaml(Path("own.yaml")) != before
        assert stages(*given) == expected

    def test_comments_and_order_of_a_configuration_change_nothing(self, here):
        Path("own.yaml").write_text(Path(MHA).read_text())
        given = (*GIVEN, "--asr_config", "own.yaml")
        pretend_done(*given)
        Path("own.yaml").write_text("# a comment\n" + Path(MHA).read_text())
        assert stages(*given) == set()


@pytest.mark.parametrize("form", ["--corpus synth", "--corpus=synth"])
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_what_suits_a_corpus_is_its_default(here, form, streaming):
    args = parse([*form.split(), "--use_streaming", streaming])
    assert args.nbpe == 40 and args.overlay == Path("conf/overlays/small.yaml")
    assert args.speed_perturb_factors == []
    name = "decode_asr_streaming" if streaming == "true" else "decode_asr_fast"
    assert args.inference_config.stem == name
    assert parse([*form.split(), "--nbpe", "70"]).nbpe == 70
