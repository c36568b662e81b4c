"""Options of run.sh for Whisper: what suits its tokens, what reruns, what is refused."""

import sys
from pathlib import Path

import pytest
from forecasts import pretend_done, recipe_place, stages

from espnet_kv.errors import UserError
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse
from espnet_kv.recipe.plan import plan

MHA = "conf/train_asr_conformer_mha.yaml"
FINETUNE, ZERO_SHOT = (
    f"conf/tuning/train_asr_whisper_{name}.yaml" for name in ("tiny_finetune", "zero_shot")
)
GIVEN = ("--corpus", "synth", "--token_type", "whisper_en")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    return recipe_place(tmp_path, monkeypatch)


def test_what_suits_its_tokens_is_the_default(here):
    args = parse([*GIVEN, "--asr_config", FINETUNE])
    assert (args.cleaner, args.feats_normalize) == ("whisper_en", "none")
    assert args.inference_config == Path("conf/decode_asr_whisper.yaml")
    assert args.overlay is None  # that of the corpus is one of other encoders
    args = parse(["--token_type", "whisper_multilingual", "--lang", "de", "--cleaner=none"])
    assert args.cleaner == "none"
    args = parse(["--token_type", "whisper_multilingual", "--lang", "de"])
    assert args.cleaner == "whisper_basic"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("cleaner", "none", {10, 11, 13, 12, 14}),
        ("whisper_model", "other.pt", {11, 12, 13, 14}),
        ("asr_config", ZERO_SHOT, {11, 12, 13, 14}),
        ("nbpe", "70", set()),
    ],
)
def test_a_change_reruns_what_depends_on_it(here, option, value, expected):
    for name in ("weights.pt", "other.pt"):
        Path(name).write_text(name)
    given = (*GIVEN, "--asr_config", FINETUNE, "--whisper_model", "weights.pt")
    pretend_done(*given)
    assert stages(*given) == set()
    assert stages(*given, f"--{option}", value) == expected
    Path("weights.pt").write_text("trained longer")
    assert stages(*given) == {11, 12, 13, 14}


def test_without_epochs_nothing_is_made_of_the_training_sets(here):
    args = parse([*GIVEN, "--asr_config", ZERO_SHOT, "--speed_perturb_factors=1 2"])
    steps = plan(Layout(args))
    skipped = {step.name for step in steps if step.skipped == "max_epoch 0"}
    sets = ("train_clean_100", "dev")
    assert skipped == {f"{what} {s}" for what in ("format", "lengths") for s in sets} | {
        "perturb train_clean_100"
    }
    assert not [step for step in steps if step.stage == 10]
    both = parse([*GIVEN, "--asr_config", f"{ZERO_SHOT} {FINETUNE}"])
    assert not [step for step in plan(Layout(both)) if step.skipped == "max_epoch 0"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--asr_config", MHA), "decoder: transformer; take kv_whisper"),
        (("--asr_config", "own.yaml"), 'needs sym_sos: "<.startoftranscript.>" in model_conf'),
        (("--token_type", "whisper_multilingual"), "tokens of whisper_model tiny.en are whisp"),
        (("--feats_normalize", "global_mvn"), "give --feats_normalize none"),
        (("--fs", "8000"), "takes 16000 Hz"),
        (("--max_wav_duration", "40"), "takes 30 s"),
        (("--use_streaming", "true"), "does not stream"),
        (("--use_lm", "true"), "no language model of whisper_en tokens"),
        (("--use_ngram", "true"), "no language model of whisper_en tokens"),
        (("--whisper_model", "no/such.pt"), "whisper_model no/such.pt does not exist"),
        (("--token_type", "bpe", "--cleaner=whisper_en"), "goes with --token_type whisper_en"),
        (
            ("--token_type", "bpe", "--asr_config", MHA, "--whisper_model=tiny"),
            "has encoder: k",
        ),
        (("--asr_args", "--max_epoch x"), "max_epoch x: a whole number is needed"),
    ],
)
def test_what_does_not_go_together_is_refused(here, options, said):
    Path("own.yaml").write_text("encoder: kv_whisper\ndecoder: kv_whisper\n")
    args = parse([*GIVEN, "--asr_config", FINETUNE, *options])
    with pytest.raises(UserError, match=said):
        plan(Layout(args))


@pytest.mark.parametrize(
    ("lang", "said"), [("xx", "no language of ESPnet's Whisper"), ("de", "whisper_language en")]
)
def test_the_language_is_one_and_the_same(here, lang, said):
    Path("tiny.pt").write_text("weights")
    args = parse(
        [
            *("--corpus", "synth", "--token_type", "whisper_multilingual", "--lang", lang),
            *("--asr_config", FINETUNE, "--whisper_model", "tiny.pt"),
        ]
    )
    with pytest.raises(UserError, match=said):
        plan(Layout(args))


def test_the_missing_package_is_named(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper", None)
    args = parse([*GIVEN, "--asr_config", FINETUNE])
    with pytest.raises(UserError, match=r"openai-whisper .* 'espnet_kv\[whisper\]"):
        plan(Layout(args))


def test_a_conversion_of_a_whisper_experiment_is_planned(here):
    source = Path("exp/asr_whisper")
    source.mkdir(parents=True)
    (source / "config.yaml").write_text(Path(FINETUNE).read_text())
    (source / "valid.acc.ave.pth").write_text("weights")
    convert = ("--convert_from", str(source), "--attention_type", "mla", "--kv_rank", "8 16")
    args = parse([*GIVEN, *convert, "--convert_parts", "decoder_self,decoder_cross"])
    made = [step for step in plan(Layout(args)) if step.stage == 11]
    assert [step.name for step in made] == [
        f"asr_whisper_mla_r{rank}_decoder_self_decoder_cross" for rank in (8, 16)
    ]
    for step in made:
        (job,) = step.jobs()
        options = dict(zip(job.arguments[2:], job.arguments[3:], strict=False))
        assert options["--parts"] == "decoder_self,decoder_cross"
        assert f"--asr_train_config={source / 'config.yaml'}" in job.arguments
