"""The real ESPnet's scripts: its setup.sh on the recipe, and the names its asr.sh gives."""

import subprocess
from pathlib import Path

import pytest
from espnet_checkout import put_recipe, run, set_up

from espnet_kv.recipe.checkout import NAMED_BY_US, options_of
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse

CONFIG = "conf/train_asr_conformer_mla.yaml"
GIVEN = [
    *("--train_set", "train_clean_100", "--valid_set", "dev", "--test_sets", "test_clean dev"),
    *("--asr_config", CONFIG, "--inference_config", "conf/decode_asr.yaml", "--lang", "en"),
    *("--nbpe", "5000", "--speed_perturb_factors", "0.9 1.0 1.1", "--use_lm", "false"),
    *("--lm_config", "conf/train_lm_transformer.yaml", "--ngram_num", "3"),
]
NAMES = ("asr_exp", "asr_stats_dir", "lm_exp", "lm_stats_dir", "inference_tag", "token_list")


@pytest.fixture(scope="module")
def asr1(egs2) -> Path:
    """The recipe, copied and called once."""
    asr1 = put_recipe(egs2)
    ended = run(asr1, "--stage=9", "--stop_stage=9")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Skipped stages:  6 7 8 9" in ended.stdout
    return asr1


def test_after_setup_sh_the_recipe_is_whole(asr1):
    for _ in range(2):
        set_up(asr1)
    assert (asr1 / "db.sh").is_symlink() and (asr1 / "path.sh").is_symlink()
    assert (asr1 / CONFIG).is_file() and (asr1 / "conf/fbank.conf").is_file()
    options = ["--stop_stage=12", f"--asr_config={CONFIG}", "--speed_perturb_factors="]  # no sox
    ended = run(asr1, "--dry_run=true", *options)
    assert ended.returncode == 0, ended.stderr
    assert f"--asr_config {CONFIG}" in ended.stdout


def test_what_is_not_to_be_given_is_an_option_of_asr_sh(asr1):
    known = options_of(asr1 / "asr.sh")
    assert known["nbpe"] == "30" and len(known) > 90
    assert NAMED_BY_US.keys() <= known.keys()


@pytest.fixture(scope="module")
def namer(asr1) -> Path:
    """asr.sh up to its first stage, which then prints the names."""
    head, _, stages = (asr1 / "asr.sh").read_text().partition("# ========================== Main")
    assert stages
    values = " ".join(f'"${{{name}}}"' for name in NAMES)
    (asr1 / "names.sh").write_text(f"{head}\nprintf 'NAME %s\\n' {values}\n")
    return asr1 / "names.sh"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lang", "noinfo"],
        ["--lang", "de", "--token_type", "char"],
        ["--token_type", "whisper_en"],
        ["--lang", "de", "--token_type", "whisper_multilingual", "--cleaner", "none"],
        ["--nbpe", "64", "--bpemode", "bpe", "--speed_perturb_factors", ""],
        ["--asr_args", "--max_epoch 3 --optim_conf lr=0.1 --init_param exp/x/1epoch.pth"],
        ["--asr_tag", "mine", "--lm_tag", "mine"],
        ["--asr_exp", "exp/mine", "--asr_stats_dir", "exp/my_stats", "--lm_exp", "elsewhere/lm"],
        ["--use_lm", "true", "--lm_exp", "exp/my_lm", "--lm_stats_dir", "exp/my_lm_stats"],
        ["--use_ngram", "true", "--ngram_exp", "exp/my_ngram"],
        ["--inference_tag", "mine"],
        ["--inference_config", "tuned.yaml"],
        ["--inference_args", "--beam_size 5 --penalty=0.1"],
        ["--inference_asr_model", "valid.loss.best.pth"],
        ["--inference_asr_model", "3epoch.pth", "--expdir", "other"],
        ["--use_lm", "true", "--lm_args", "--max_epoch 2"],
        ["--use_lm", "true", "--inference_lm", "5epoch.pth", "--use_ngram", "true"],
        ["--use_streaming", "true", "--inference_config", "conf/decode_asr_streaming.yaml"],
    ],
    ids=lambda options: " ".join(options)[:50] or "defaults",
)
def test_names_are_those_of_asr_sh(asr1, namer, monkeypatch, options):
    monkeypatch.chdir(asr1)
    (asr1 / "tuned.yaml").write_text("beam_size: 3\n")
    ended = subprocess.run(["bash", namer, *GIVEN, *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("NAME ")]
    theirs = dict(zip(NAMES, (line.removeprefix("NAME ") for line in lines), strict=True))

    layout = Layout(parse([*GIVEN, *options]))
    config = Path(CONFIG)
    assert theirs == {
        "asr_exp": str(layout.asr_exp(config)),
        "asr_stats_dir": str(layout.stats(config)),
        "lm_exp": str(layout.lm_exp),
        "lm_stats_dir": str(layout.lm_stats),
        "inference_tag": layout.inference_name,
        "token_list": str(layout.token_list),
    }
    place = layout.asr_exp(config) / layout.inference_name
    assert layout.decoded(config, "test_clean") == place / "test_clean"
    assert layout.decoded(config, "dev") == place / "org/dev"
