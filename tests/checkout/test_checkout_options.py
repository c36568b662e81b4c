"""Inside an ESPnet checkout: options are sorted and checked, and asr.sh is called with them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import alive, assert_one_line, wait_until
from commands import run as call
from espnet_checkout import REPO, calls, put_recipe, run, stand_in

from espnet_kv.recipe import asr_sh
from espnet_kv.recipe import checkout as driver
from espnet_kv.recipe.options import DIRECTORIES, parse, parser
from espnet_kv.recipe.pool import cores

TOOLS = ("bash", "dirname", "env", "perl", "sox", "sclite", "cat", "pwd")


@pytest.fixture
def asr1(tmp_path) -> Path:
    return put_recipe(stand_in(tmp_path))


@pytest.fixture
def tools(tmp_path) -> str:
    """A PATH of the programs that the scripts need, those of ESPnet's asr.sh as stubs."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        if found and name not in ("sox", "sclite"):
            (folder / name).symlink_to(found)
        else:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    (folder / "python3").symlink_to(sys.executable)
    return str(folder)


def said(ended) -> str:
    """The one line with which a run has failed, before asr.sh was called."""
    assert ended.returncode == 1 and calls(ended.stdout) == [], ended.stdout + ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def called(ended) -> list[dict[str, str]]:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return calls(ended.stdout)


class TestCalls:
    def test_several_models_are_several_calls_and_share_the_stages_before(self, asr1, tools):
        names = "conf/train_asr_conformer_mha.yaml conf/train_asr_branchformer_mla.yaml"
        ended = run(asr1, "--stop_stage", "13", "--asr_config", names, PATH=tools)
        first, second = called(ended)
        assert [first["--stage"], second["--stage"]] == ["1", "11"]
        assert first["--stop_stage"] == second["--stop_stage"] == "13"
        assert [first["--asr_config"], second["--asr_config"]] == names.split()
        assert second["--asr_exp"] == "exp/asr_train_asr_branchformer_mla_raw_en_bpe5000_sp"
        assert second["--asr_stats_dir"] == first["--asr_stats_dir"]
        assert first["--python"] == f"{sys.executable} -m espnet_kv"

    def test_run_all_trains_eight(self, asr1, tools):
        ended = run(asr1, "--stage=11", "--stop_stage=11", script="run_all.sh", PATH=tools)
        configs = [call["--asr_config"] for call in called(ended)]
        assert len(set(configs)) == 8

    def test_models_of_another_front_end_have_statistics_of_their_own(self, asr1, tools):
        config = (asr1 / "conf/train_asr_conformer_mha.yaml").read_text()
        (asr1 / "other.yaml").write_text(config + "\nfrontend_conf: {n_mels: 40}\n")
        names = "conf/train_asr_conformer_mha.yaml other.yaml"
        ended = run(asr1, "--stage=11", "--stop_stage=11", "--asr_config", names, PATH=tools)
        assert [call["--stage"] for call in called(ended)] == ["11", "11"]
        ended = run(asr1, "--stage=5", "--stop_stage=11", "--asr_config", names, PATH=tools)
        first, second = called(ended)
        assert [first["--stage"], second["--stage"]] == ["5", "10"]
        assert first["--asr_stats_dir"] != second["--asr_stats_dir"]

    def test_defaults_are_those_of_this_machine(self, asr1, tools):
        (call,) = called(run(asr1, "--stop_stage=12", PATH=tools))
        assert call["--ngpu"] == "0"
        assert call["--nj"] == call["--inference_nj"] == str(min(32, cores()))

    def test_data_and_decoding_are_those_of_our_driver(self, asr1, tools):
        streaming = ("--use_streaming", "true", "--inference_args", "--chunk_size 8")
        (call,) = called(run(asr1, "--stop_stage=13", *streaming, PATH=tools))
        assert call["--test_sets"] == "test_clean test_other dev_clean dev_other"
        assert call["--bpe_train_text"] == "data/train_clean_100/text"
        assert call["--inference_config"] == "conf/decode_asr_streaming.yaml"
        assert call["--inference_tag"] == (
            "decode_asr_streaming_chunk_size8_asr_model_valid.acc.ave"
        )
        # an utterance of just so many samples is dropped by asr.sh
        low, high = (float(call[f"--{end}_wav_duration"]) for end in ("min", "max"))
        assert (int(low * 16000), int(high * 16000)) == (1600 - 1, 30 * 16000 + 1)
        fast = ("--inference_config", "conf/decode_asr_fast.yaml")
        (call,) = called(run(asr1, "--stop_stage=13", *fast, PATH=tools))
        assert call["--batch_size"] == "8"

    def test_an_overlay_becomes_part_of_the_configuration(self, asr1, tools):
        small = ("--overlay", "conf/overlays/small.yaml")
        (call,) = called(run(asr1, "--stop_stage=13", *small, PATH=tools))
        assert call["--asr_exp"].endswith("_raw_en_bpe5000_sp_small")
        config = (asr1 / call["--asr_config"]).read_text()
        assert "output_size: 80" in config and "per_encoder" not in config

    def test_whisper_is_trained_with_what_suits_its_tokens(self, asr1, tools):
        (asr1 / "tiny.pt").write_text("weights")
        config = "conf/tuning/train_asr_whisper_tiny_finetune.yaml"
        given = ["--token_type", "whisper_en", "--asr_config", config]
        (call,) = called(run(asr1, "--stop_stage=13", *given, PATH=tools))
        assert call["--asr_config"] == config
        assert call["--token_type"] == call["--cleaner"] == "whisper_en"
        assert call["--feats_normalize"] == "none"
        assert call["--inference_config"] == "conf/decode_asr_whisper.yaml"
        given += ("--stop_stage=13", "--whisper_model=tiny.pt")
        (call,) = called(run(asr1, *given, PATH=tools))
        assert call["--asr_exp"].endswith("_finetune_raw_en_whisper_en_sp_tiny")
        assert (asr1 / call["--asr_config"]).read_text().count("whisper_model: tiny.pt") == 2
        ended = run(asr1, "--token_type", "whisper_en", PATH=tools)
        assert "decoder: transformer; take kv_whisper" in said(ended)

    def test_the_dump_that_is_there_says_its_format(self, asr1, tools):
        dump = asr1 / "dump/raw/dev"
        dump.mkdir(parents=True)
        (dump / "audio_format").write_text("flac\n")
        (call,) = called(run(asr1, "--stage=10", "--stop_stage=12", PATH=tools))
        assert call["--audio_format"] == "flac"
        (call,) = called(run(asr1, "--stage=3", "--stop_stage=12", PATH=tools))
        assert call["--audio_format"] == "flac.ark"

    def test_options_of_asr_sh_alone_are_handed_on(self, asr1, tools):
        more = ("--pretrained-model", "m.pth", "--skip_eval=true", "--stop_stage", "13")
        (call,) = called(run(asr1, *more, PATH=tools))
        assert call["--pretrained_model"] == "m.pth" and call["--skip_eval"] == "true"

    def test_a_dry_run_prints_the_calls_and_makes_nothing(self, asr1, tools):
        before = sorted(asr1.rglob("*"))
        ended = run(asr1, "--dry_run=true", "--overlay=conf/overlays/small.yaml", PATH=tools)
        assert "./asr.sh --stage 1 --stop_stage 13" in ended.stdout
        assert calls(ended.stdout) == []
        made = set(asr1.rglob("*")) - set(before)
        assert not [path for path in made if path.parts[-1] in ("asr.sh", "exp", "configs")]


def restore(number: int) -> None:
    """Give a signal its default action, which whoever started the tests may have taken from it."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_what_ends_the_run_ends_asr_sh(asr1, tools, number):
    """asr.sh and what it started lead a process group of their own."""
    asr_sh = asr1.parents[1] / "TEMPLATE/asr1/asr.sh"
    asr_sh.write_text(asr_sh.read_text() + "sleep 600 & echo $! >pid; wait\n")
    environment = os.environ | {"python": sys.executable, "PYTHONPATH": str(REPO)}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    process = subprocess.Popen(
        ["./run.sh", "--stop_stage=13"],
        cwd=asr1,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(restore, signal.Signals[number]),
    )
    pid = asr1 / "pid"
    while not pid.exists() or not pid.read_text().strip():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.Signals[number])
    _, errors = process.communicate(timeout=300)
    if number == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + signal.Signals[number]
        line = f"error: stopped by {number}: the same command goes on from here\n"
        assert errors == line
    assert wait_until(lambda: not alive(int(pid.read_text())), 5)


class TestStagesAfterIts:
    @pytest.fixture
    def ours(self, asr1) -> Path:
        """The recipe with a driver of ours that says how it was called."""
        (asr1 / "kv_asr.sh").write_text('#!/usr/bin/env bash\nprintf "ours %s\\n" "$*"\n')
        return asr1

    def test_are_ours(self, ours, tools):
        options = ("--stage=12", "--profile_args=--utterances 5", "--nj=1")
        ended = run(ours, *options, "--stop_stage=14", PATH=tools)
        (call,) = called(ended)
        assert (call["--stage"], call["--stop_stage"]) == ("12", "13")
        assert "--profile_args" not in call
        last = "ours --stage=14 --profile_args=--utterances 5 --nj=1 --stop_stage=14"
        assert ended.stdout.splitlines()[-1] == last

    @pytest.mark.parametrize(
        "options",
        [
            ("--stage=14",),
            ("--corpus=synth", "--stop_stage=13"),
            ("--convert_from=exp/asr_x", "--attention_type=mla", "--kv_rank=8"),
        ],
        ids=lambda options: options[0],
    )
    def test_where_asr_sh_takes_no_part_it_is_not_asked(self, ours, options):
        ended = run(ours, *options)  # and none of its programs is needed
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == f"ours {' '.join(options)}"


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "line"),
        [
            (["--stagee", "1"], "--stagee: neither run.sh nor ESPnet's asr.sh takes it"),
            (["--not_an_option", "1"], "--not_an_option: neither"),
            (["stage"], "stage: neither"),
            (["--stage"], "--stage needs a value"),
            (["--use_word_lm", "yes"], "--use_word_lm yes: neither true nor false"),
            (["--train_nj", "2"], "--train_nj: .* asr.sh trains one model after the other"),
            (["--datadir", "d"], "--datadir: .* keeps data directories in data/"),
            (["--python", "x"], "--python: set the variable python"),
            (["--inference_ngram", "x"], "--inference_ngram: give --ngram_num"),
            (["--stage", "14", "--skip_eval", "true"], "--skip_eval: .* stages 1 to 13 only"),
            (["--corpus", "synth", "--skip_eval", "true"], "--skip_eval: .* --corpus synth"),
            (
                [
                    "--convert_from",
                    "x",
                    "--attention_type=mla",
                    "--kv_rank=8",
                    "--pretrained_model=x",
                ],
                "--pretrained_model: .* --convert_from",
            ),
            (["--kv_rank", "4"], "--kv_rank: goes with --convert_from"),
            (["--nj", "0"], "--nj: '0' is not a whole number"),
            (["--audio_format", "m4a"], "--audio_format"),
            (["--ngpu", "1"], "--ngpu 1: torch finds no GPU"),
            (["--asr_config", "conf/no.yaml"], "conf/no.yaml does not exist"),
            (["--use_lm", "true", "--lm_config", "no.yaml"], "no.yaml does not exist"),
            (["--expdir", "my exp"], "my exp.*: asr.sh cannot take ' ' in it"),
            (["--asr_args", "--init_param 'a b'"], "--asr_args: asr.sh would split 'a b'"),
            (["--asr_tag", "$(touch pwned)"], r"pwned\): asr.sh cannot take '\$'"),
            (
                ["--inference_args", "--beam 3 --chunk_size=8"],
                "inference_args: --chunk_size: espnet",
            ),
            (["--profile_args", "--runs 3"], "--profile_args: --runs: espnet_kv.bin.profile has"),
            (["--train_set", "dev"], "--train_set dev: asr.sh needs other sets"),
        ],
        ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
    )
    def test_before_anything_is_done(self, asr1, tools, options, line, monkeypatch):
        monkeypatch.chdir(asr1)
        monkeypatch.setenv("PATH", tools)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        ended = call(driver.main, str(asr1.parents[1] / "TEMPLATE/asr1"), *options)
        assert re.search(line, said(ended))
        assert not (asr1 / "asr.sh").exists() and not (asr1 / "pwned").exists()

    @pytest.mark.parametrize(
        ("tool", "stages", "line"),
        [
            ("sclite", ("1", "13"), "sclite for stage 13 (apt-get install sctk"),
            ("sox", ("1", "13"), "sox for stage 2 (apt-get install sox"),
        ],
    )
    def test_missing_programs_are_told_before_stage_1(
        self, asr1, tools, monkeypatch, tool, stages, line
    ):
        Path(tools, tool).unlink()
        monkeypatch.chdir(asr1)
        monkeypatch.setattr(driver, "SCTK", Path("nowhere"))
        monkeypatch.setenv("PATH", tools)
        options = [str(asr1.parents[1] / "TEMPLATE/asr1"), "--stage", stages[0]]
        ended = call(driver.main, *options, "--stop_stage", stages[1])
        assert line in ended.stderr
        assert_one_line(ended, tool)
        # one that no stage asked for needs is not missed
        before = "12" if tool == "sclite" else "1"
        ended = call(driver.main, options[0], "--stage", "1", "--stop_stage", before)
        assert ended.returncode == 0, ended.stderr

    def test_a_missing_kenlm_is_told_before_stage_1(self, asr1, tools, monkeypatch):
        monkeypatch.setattr(driver, "find_spec", lambda name: None)
        monkeypatch.chdir(asr1)
        monkeypatch.setenv("PATH", tools)
        options = [str(asr1.parents[1] / "TEMPLATE/asr1"), "--use_ngram", "true"]
        ended = call(driver.main, *options, "--stop_stage", "13")
        assert_one_line(ended, r"lmplz for stage 9 .*build_binary .*package kenlm for stage 12")
        ended = call(driver.main, *options, "--stage", "12", "--stop_stage", "13")
        assert "lmplz" not in ended.stderr and "kenlm for stage 12" in ended.stderr
        ended = call(driver.main, *options, "--stop_stage", "8")
        assert ended.returncode == 0, ended.stderr

    def test_every_option_of_ours_alone_is_sorted(self):
        """A new option of run.sh needs its word on what it means inside a checkout."""
        options = {action.dest for action in parser()._actions} - {"help"}
        group = next(g for g in parser()._action_groups if str(g.title).startswith("conversion"))
        conversion = {action.dest for action in group._group_actions}
        other_corpora = {name for name in options if name.startswith(("synth_", "digits_"))}
        handed = set(asr_sh.AS_GIVEN) | {"stage", "stop_stage", "ngpu", "speed_perturb_factors"}
        handed |= {"min_wav_duration", "max_wav_duration", "asr_config", "test_sets"}
        named = {"asr_tag", "lm_tag", "inference_tag", *DIRECTORIES}
        sorted_ones = driver.CARRIED | driver.NO_MEANING.keys() | conversion | other_corpora
        assert options == sorted_ones | handed | named
        assert not sorted_ones & handed


class TestFolder:
    def test_links_that_lead_nowhere_are_made_anew(self, asr1, tools):
        for name in ("steps", "utils"):
            (asr1 / name).symlink_to(f"../../../tools/kaldi/egs/wsj/s5/{name}")
        for _ in range(2):
            called(run(asr1, "--stop_stage=13", PATH=tools))
            for name in driver.LINKS:
                assert os.readlink(asr1 / name) == f"../../TEMPLATE/asr1/{name}"
                assert (asr1 / name).exists()

    def test_the_folder_may_be_a_link_into_the_checkout(self, tmp_path, tools):
        egs2 = stand_in(tmp_path / "espnet")
        put_recipe(tmp_path / "clone/egs2")
        (egs2 / "librispeech_100_kv").symlink_to(tmp_path / "clone/egs2/librispeech_100_kv")
        asr1 = egs2 / "librispeech_100_kv/asr1"
        for _ in range(2):
            called(run(asr1, "--stop_stage=13", PATH=tools))
        assert (asr1 / "utils").resolve() == (egs2 / "TEMPLATE/asr1/utils").resolve()

    def test_configurations_are_copied_with_it(self, asr1):
        assert not (asr1 / "conf").is_symlink()
        assert (asr1 / "conf/train_asr_conformer_mha.yaml").is_file()

    def test_below_a_folder_with_a_space_it_says_so(self, tmp_path):
        asr1 = put_recipe(stand_in(tmp_path / "my espnet"))
        assert "a folder with a space in its name" in said(run(asr1, "--stage=1"))

    def test_an_interpreter_in_a_folder_with_a_space(self, asr1, tools, tmp_path):
        python = tmp_path / "my python/python3"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (call,) = called(run(asr1, "--stop_stage=13", PATH=tools, python=str(python)))
        assert " " not in call["--python"].removesuffix(" -m espnet_kv")

    def test_a_python_without_the_package(self, asr1, tmp_path):
        python = tmp_path / "bare"
        python.write_text('#!/bin/sh\ncase "$2" in *espnet_kv*) exit 1 ;; esac\n')
        python.chmod(0o755)
        line = said(run(asr1, "--stage=1", python=str(python)))
        assert "has no espnet_kv: install the package there" in line

    @pytest.mark.parametrize(
        ("environment", "own", "template", "copy"),
        [
            ("", "", "/of/espnet", "/of/espnet"),
            ("", "/of/recipe", "/of/espnet", "/of/recipe"),
            ("/of/user", "/of/recipe", "/of/espnet", "/of/user"),
            ("", "", "downloads", "downloads"),
        ],
    )
    def test_where_the_corpus_lies(self, asr1, tools, environment, own, template, copy):
        """The environment wins over db.sh of the recipe, and that over ESPnet's."""
        (asr1.parents[1] / "TEMPLATE/asr1/db.sh").write_text(f"LIBRISPEECH={template}\n")
        if own:
            text = (asr1 / "db.sh").read_text()
            assert 'LIBRISPEECH="${LIBRISPEECH:-}"' in text
            (asr1 / "db.sh").write_text(text.replace("${LIBRISPEECH:-}", own))
        (asr1 / "kv_asr.sh").write_text("")
        probe = 'set -eu; . ./local/environment.sh; echo "copy ${LIBRISPEECH}"\n'
        (asr1 / "probe.sh").write_text(f"#!/usr/bin/env bash\n{probe}")
        (asr1 / "probe.sh").chmod(0o755)
        given = {"LIBRISPEECH": environment} if environment else {}
        ended = run(asr1, script="probe.sh", PATH=tools, **given)
        assert ended.stdout.splitlines()[-1] == f"copy {copy}", ended.stderr

    def test_what_espnet_would_download_is_downloaded(self, monkeypatch):
        monkeypatch.chdir(Path(driver.__file__).parents[2])
        monkeypatch.setenv("LIBRISPEECH", "downloads")
        assert parse([]).corpus_dir is None
