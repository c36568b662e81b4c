"""Options that users mistype: one line that names the option, before anything is done."""

import pytest
from small_recipe import make_recipe, run, said

LONG = " ".join(f"--encoder_conf number_{n}={n}" for n in range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def options(folder) -> list[str]:
    return make_recipe(folder)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--stage", "5", "--stop_stage", "3"], "--stage 5 is above --stop_stage 3"),
        (["--stage", "0"], "--stage 0: there are stages 1 to 18"),
        (["--ngpu", "-1"], "--ngpu: '-1' is not a whole number of 0 or more"),
        (["--nj", "0"], "--nj: '0' is not a whole number from 1 to 10000"),
        (["--nj", "1000000000"], "--nj: '1000000000' is not a whole number from 1 to 10000"),
        (["--nj", "two"], "--nj: 'two' is not a whole number"),
        (["--fs", "fast"], "--fs: 'fast' is no sampling rate"),
        (["--fs", "-8k"], "--fs"),
        (["--asr_tag", "../x"], "--asr_tag: '../x' cannot be part of a directory's name"),
        (["--inference_tag", ".."], "--inference_tag: '..' cannot be part"),
        (["--lang", "a/b"], "--lang: 'a/b' cannot be part"),
        (["--asr_args", "--max_epoch '3"], '--asr_args: "--max_epoch \'3": no closing quotation'),
        (["--inference_args", '"'], "--inference_args"),
        (["--asr_config", ""], "--asr_config is empty"),
        (["--asr_config", "conf/o'k.yaml"], "conf/o'k.yaml\": no closing quotation"),
        (["--test_sets", "it's"], '--test_sets: "it\'s": no closing quotation'),
        (["--asr_config", "conf/no.yaml"], "conf/no.yaml does not exist"),
        (["--overlay", "no.yaml"], "no.yaml does not exist"),
        (["--lm_config", "no.yaml", "--use_lm", "true"], "no.yaml does not exist"),
        (["--min_wav_duration", "nan"], "--min_wav_duration: 'nan' is not a number of seconds"),
        (["--max_wav_duration", "-3"], "--max_wav_duration"),
        (["--bpe_char_cover", "2"], "--bpe_char_cover: '2' is not above 0 and at most 1"),
        (["--speed_perturb_factors", "fast"], "--speed_perturb_factors"),
        (["--speed_perturb_factors", "1.0 1.0"], "speed factors"),
        (["--train_set", "own/none"], "own/none is not a data directory"),
        (["--test_sets", ""], "--test_sets: --corpus kaldi needs it"),
        (["--corpus", "librispeech_960"], "--corpus librispeech_960: unknown"),
        (["--audio_format", "m4a"], "m4a"),
        (["--token_type", "word"], "--token_type"),
        (["--use_lm", "yes"], "'yes' is neither true nor false"),
        (["--nbpe", "100000", "--token_type", "bpe"], "nbpe 100000 is too large"),
        (["--use_streaming", "true", "--use_lm", "true"], "streaming decodes with the model alone"),
        (["--stagee", "1"], "unrecognized arguments: --stagee 1"),
        (["--stage"], "--stage: expected one argument"),
        (["--asr_tag", "x" * 240], "asr_xxx"),
        (["--asr_args", LONG], "allowed: name it yourself with --asr_tag"),
        (["--inference_args", LONG], "allowed: name it yourself with --inference_tag"),
        (["--use_lm", "true", "--lm_args", LONG], "allowed: name it yourself with --lm_tag"),
        (["--kv_rank", "4"], "--kv_rank: goes with --convert_from"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_is_told_in_one_line(folder, options, given, line):
    assert line in said(run(folder, *options, "--stop_stage", "5", *given))


def test_gpus_that_are_not_there(folder, options, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for option in (["--ngpu", "2"], ["--gpu_inference", "true"]):
        assert option[0] in said(run(folder, *options, "--stage", "11", *option))


@pytest.mark.parametrize("form", ["--fs=16k", "--fs=16000", "--fs=16K"])
def test_ways_to_write_an_option(folder, options, form):
    code, out, err = run(folder, *options, form, "--stage=9", "--stop_stage=9")
    assert code == 0 and "done in" in out, err


def test_sets_and_configurations_given_twice_are_done_once(folder, options):
    mha = "conf/train_asr_conformer_mha.yaml"
    code, out, _ = run(
        folder,
        *options,
        *("--test_sets", "own/test own/test", "--asr_config", f"{mha} {mha}", "--dry_run", "true"),
    )
    steps = [line for line in out.splitlines() if line.startswith("stage 12")]
    assert code == 0 and len(steps) == 1


def test_two_configurations_of_one_name(folder, options):
    (folder / "other").mkdir(exist_ok=True)
    other = folder / "other/train_asr_conformer_mha.yaml"
    other.write_text("encoder: kv_conformer\n")
    both = f"conf/train_asr_conformer_mha.yaml {other}"
    assert "one by one with --asr_tag" in said(run(folder, *options, "--asr_config", both))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "expected keys and values"),
        ("a: [", "is not a YAML file"),
        ("batch_size: 3\n", "no encoder is named"),
        ("\tencoder: x", "is not a YAML file"),
    ],
)
def test_a_configuration_that_is_none(folder, options, content, line):
    (folder / "bad.yaml").write_text(content)
    outcome = run(folder, *options, "--overlay", "", "--asr_config", "bad.yaml")
    assert "bad.yaml" in said(outcome) and line in said(outcome)
