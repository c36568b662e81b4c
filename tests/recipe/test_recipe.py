"""The recipe as its users run it: run.sh from stage 1 to 13 on a tiny synth corpus."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_recipe
import yaml
from synth_recipe import RECIPE, REPO, SIZES, TINY

MODELS = ("mha", "linear")
COMMON = ("--corpus", "synth", "--overlay", "tiny.yaml", *SIZES)
LANGUAGE_MODEL = ("--use_lm", "true", "--lm_config", "tiny_lm.yaml")
# an untrained model ends its hypotheses late: a wide beam would search for minutes
SEARCH = ("--inference_args", "--beam_size 2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A copy of the recipe, as a user would have it, with an overlay of its own."""
    asr1 = tmp_path_factory.mktemp("egs2") / "asr1"
    shutil.copytree(
        RECIPE, asr1, ignore=shutil.ignore_patterns("conf", "data", "dump", "exp", "demo", "down*")
    )
    (asr1 / "conf").symlink_to(REPO / "conf")
    (asr1 / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    lm = yaml.safe_load((REPO / "conf/train_lm_small.yaml").read_text())
    lm |= small_recipe.LM | {"lm": "kv_transformer"}
    lm["lm_conf"] |= {"attention_type": "gqa", "attention_conf": {"num_kv_heads": 2}}
    (asr1 / "tiny_lm.yaml").write_text(yaml.safe_dump(lm))
    return asr1


def start(asr1: Path, *options: str, **kwargs) -> subprocess.Popen:
    """Start run.sh, as a user does."""
    command = ["./run.sh", *COMMON, *options]
    env = os.environ | {
        "python": sys.executable,
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
    }
    env.pop("LIBRISPEECH", None)
    return subprocess.Popen(
        command,
        cwd=asr1,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def run(asr1: Path, *options: str) -> tuple[int, str, str]:
    """What run.sh starts, in this process: its jobs share a server that has loaded ESPnet."""
    return small_recipe.run(asr1, *COMMON, *options)


def configs(*models: str) -> str:
    return " ".join(f"conf/train_asr_conformer_{model}.yaml" for model in models)


@pytest.fixture(scope="module")
def finished(recipe) -> tuple[Path, str]:
    """The recipe after stages 1 to 13 with a language model, and what it printed."""
    process = start(
        recipe,
        *("--stop_stage", "13"),
        *("--asr_config", configs(*MODELS), "--train_nj", "2", "--inference_nj", "2"),
        *(*LANGUAGE_MODEL, *SEARCH, "--speed_perturb_factors", "1.0 1.1"),
    )
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return recipe, out


def experiments(asr1: Path) -> list[Path]:
    return [asr1 / f"exp/asr_train_asr_conformer_{m}_raw_en_bpe60_sp_tiny" for m in MODELS]


@pytest.mark.slow
class TestWholeRecipe:
    def test_every_stage_is_announced_and_epochs_are_shown(self, finished):
        _, out = finished
        assert [int(n) for n in re.findall(r"stage (\d+):", out)] == list(range(1, 14))
        assert len(re.findall(r"epoch [12]/2, train loss [\d.]+, valid loss [\d.]+", out)) == 4

    def test_experiments_are_espnets(self, finished):
        for exp in experiments(finished[0]):
            assert (exp / "valid.acc.ave.pth").exists()
            assert (exp / "config.yaml").exists()
            assert list((exp / "tensorboard").rglob("events.*"))
            config = yaml.safe_load((exp / "config.yaml").read_text())
            assert config["encoder"] == "kv_conformer"
            assert config["encoder_conf"]["output_size"] == 16  # the overlay's

    def test_every_test_utterance_is_decoded_once(self, finished):
        asr1 = finished[0]
        for exp in experiments(asr1):
            for name in ("test_clean", "test_other"):
                (decoded,) = exp.glob(f"decode_*/{name}")
                ref = [line.split()[0] for line in (asr1 / f"data/{name}/text").open()]
                assert [line.split()[0] for line in (decoded / "text").open()] == sorted(ref)
                assert "lm_train" in decoded.parent.name or "lm_" in decoded.parent.name

    def test_results_hold_the_rates_of_the_alignments(self, finished):
        asr1 = finished[0]
        results = (asr1 / "exp/RESULTS.md").read_text()
        for kind in ("WER", "CER", "TER"):
            assert results.count(f"### {kind}") == len(MODELS)
        rows = re.findall(r"\|decode_\S+/test_clean\|3\|(\d+)\|", results)
        words = sum(len(line.split()) - 1 for line in (asr1 / "data/test_clean/text").open())
        assert rows.count(str(words)) >= len(MODELS)
        assert "./run.sh" in results  # the command that made them

    def test_perplexity_of_the_language_model(self, finished):
        asr1 = finished[0]
        for name in ("test_clean", "test_other"):
            (ppl,) = asr1.glob(f"exp/lm_*/perplexity_{name}/ppl")
            assert 1 < float(ppl.read_text()) < 1000

    def test_a_rerun_does_nothing_again(self, finished):
        asr1 = finished[0]
        before = {p: p.stat().st_mtime_ns for p in asr1.rglob("*.pth")}
        code, out, err = run(
            asr1,
            *("--stop_stage", "13"),
            *("--asr_config", configs(*MODELS), *LANGUAGE_MODEL, *SEARCH),
            *("--speed_perturb_factors", "1.0 1.1"),
        )
        assert code == 0, out + err
        assert "epoch" not in out
        assert {p: p.stat().st_mtime_ns for p in asr1.rglob("*.pth")} == before

    def test_a_model_is_profiled_in_processes_of_its_own(self, finished):
        """Of the sizes of the tiny overlay: K and V of 16 numbers, 4 chunks of 16 frames."""
        asr1 = finished[0]
        options = (
            *("--stage", "14", "--stop_stage", "14", "--asr_config", configs("mha")),
            *("--speed_perturb_factors", "1.0 1.1", *LANGUAGE_MODEL, *SEARCH),
            *("--profile_args", "--lengths '2 6' --utterances 2 --repeats 1"),
        )
        file = experiments(asr1)[0] / "profile/profile.json"
        killed = start(asr1, *options, start_new_session=True)
        while not (file.parent / ".begun.json").exists():
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.01)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert not file.exists()
        code, out, err = run(asr1, *options)
        assert code == 0, out + err
        assert str(file.relative_to(asr1)) in out.splitlines()
        profile = json.loads(file.read_text())
        longest = profile["cache"]["fp32"]["lengths"][-1]["bounded"]["bytes"]
        assert longest["attention"] == 2 * 16 * 4 * 4 * 16
        assert profile["wer"]["offline"].keys() == {"test_clean", "test_other"}
        assert profile["model"]["overlay"] == "tiny.yaml"
        assert profile["memory"]["method"] == "torch profiler"
        assert all(row["offline_bytes"] > 0 for row in profile["memory"]["lengths"])
        assert all(row["chunk_ms"] > 0 for row in profile["time"]["lengths"])
        before = file.stat().st_mtime_ns
        code, out, err = run(asr1, *options, "--stop_stage", "15")
        assert code == 0, out + err
        assert "is up to date" in out and file.stat().st_mtime_ns == before
        assert re.search(
            r"^conformer mha( +[\d.\u2009]+( \([\d.]+ to [\d.]+\))?){10,}$", out, re.MULTILINE
        )
        assert (asr1 / "exp/report/report.html").exists()

    def test_other_settings_do_not_mix_with_a_trained_model(self, finished):
        code, _, err = run(
            finished[0],
            *("--stage", "11", "--stop_stage", "11", "--asr_config", configs("mha")),
            *("--speed_perturb_factors", "1.0 1.1"),
            *("--asr_tag", "train_asr_conformer_mha_raw_en_bpe60_sp_tiny"),
            *("--asr_args", "--max_epoch 3"),
        )
        assert code == 1
        assert "--asr_args was not given, is --max_epoch 3" in err and "--asr_tag" in err
        assert "Traceback" not in err

    def test_a_killed_training_resumes(self, finished):
        asr1 = finished[0]
        options = (
            *("--stage", "11", "--stop_stage", "11", "--asr_config", configs("gqa")),
            *("--speed_perturb_factors", "1.0 1.1", "--asr_args", "--max_epoch 6"),
        )
        exp = asr1 / "exp/asr_train_asr_conformer_gqa_raw_en_bpe60_max_epoch6_sp_tiny"
        first = start(asr1, *options, start_new_session=True)
        while not (exp / "1epoch.pth").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        assert not (exp / "valid.acc.ave.pth").exists()
        code, out, err = run(asr1, *options)
        assert code == 0, out + err
        assert f"{exp.name}: epoch 1/6" not in out
        assert f"{exp.name}: epoch 6/6" in out
        assert "The training was resumed" in (exp / "train.log").read_text()

    def test_a_failing_training_names_its_log(self, finished):
        code, _, err = run(
            finished[0],
            # rank 64 is out of the question at output_size 16
            *("--stage", "11", "--stop_stage", "11"),
            *("--asr_config", "conf/tuning/train_asr_conformer_mla_r64.yaml"),
            *("--speed_perturb_factors", "1.0 1.1"),
        )
        assert code == 1
        assert "kv_rank: 64" in err and "train.log" in err
        assert "Traceback" not in err

    def test_the_run_is_on_record(self, finished):
        for exp in experiments(finished[0]):
            record = json.loads((exp / "run.json").read_text())
            assert record["command"].startswith("./run.sh --corpus synth --overlay tiny.yaml")
            assert record["overlay"] == "tiny.yaml"


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--corpus", "librispeech_960"), "--corpus librispeech_960: unknown"),
            (("--stage", "99"), "--stage 99: there are stages 1 to"),
            (("--asr_config", "conf/no.yaml"), "conf/no.yaml does not exist"),
            (("--asr_conf", "x"), "--asr_conf"),
            (("--use_lm", "maybe"), "'maybe' is neither true nor false"),
            (("--stage", "9", "--stop_stage", "9", "--use_ngram", "true"), "needs KenLM"),
        ],
        ids=lambda x: x[0] if isinstance(x, tuple) else "",
    )
    def test_one_line_and_no_traceback(self, recipe, options, said):
        code, _, err = run(recipe, *options)
        assert code == 1
        assert said in err
        assert len(err.strip().splitlines()) == 1

    def test_help_lists_options_and_stages(self, recipe):
        process = start(recipe, "--help")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "--asr_config" in out and "13  scoring" in out
