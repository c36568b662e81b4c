"""A checkout of the real ESPnet, from the first command to the last: some ten minutes.

    make test-checkout

It needs sox and sclite, as asr.sh does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from espnet_checkout import REPO, put_recipe, run, set_up
from synth_recipe import TINY

from espnet_kv.recipe.checkout import SCTK
from espnet_kv.recipe.corpora.synth import SynthOptions, generate
from espnet_kv.scores import KINDS, read_scored_set

pytestmark = [pytest.mark.checkout, pytest.mark.slow]

OVERLAY = TINY | {"max_epoch": 1, "keep_nbest_models": 1}
OPTIONS = ["--overlay", "tiny.yaml", "--nbpe", "60", "--test_sets", "test_clean dev"]
OPTIONS += ["--speed_perturb_factors", "0.9 1.0", "--nj", "2", "--inference_nj", "2"]
OPTIONS += ["--inference_config", "conf/decode_asr_fast.yaml"]
MHA, LINEAR = (f"conf/train_asr_conformer_{name}.yaml" for name in ("mha", "linear"))
EXPS = [Path(f"exp/asr_{Path(config).stem}_raw_en_bpe60_sp_tiny") for config in (MHA, LINEAR)]
DECODING = "decode_asr_fast_asr_model_valid.acc.ave"
SETS = ("train_clean_100_sp", "org/train_clean_100_sp", "dev", "org/dev", "test_clean")


def work(asr1: Path, *options: str, script: str = "run.sh"):
    copy = str(asr1.parents[1] / "corpus")
    ended = run(asr1, *OPTIONS, *options, script=script, LIBRISPEECH=copy, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr
    return ended


@pytest.fixture(scope="module")
def asr1(egs2) -> Path:
    """The recipe after stages 1 to 13 of two models, on 48 spoken sentences."""
    if shutil.which("sox") is None or not (shutil.which("sclite") or (SCTK / "sclite").is_file()):
        pytest.skip("sox and sclite are needed: apt-get install sox sctk")
    asr1 = put_recipe(egs2)
    generate(egs2 / "corpus/LibriSpeech", SynthOptions(train=24, dev=6, test=6), 2)
    set_up(asr1)
    (asr1 / "tiny.yaml").write_text(yaml.safe_dump(OVERLAY))
    work(asr1, "--stage", "1", "--stop_stage", "13", "--asr_config", f"{MHA} {LINEAR}")
    return asr1


def rows(asr1: Path, decoding: str) -> list[str]:
    """The test sets of a decoding in exp/RESULTS.md, in the table of word error rates."""
    text = (asr1 / "exp/RESULTS.md").read_text()
    tables = re.findall(r"^### WER\n\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)
    return re.findall(rf"^\|{re.escape(decoding)}/([\w/]+)\|", "\n".join(tables), re.M)


def keys(file: Path) -> list[str]:
    return [line.split()[0] for line in file.read_text().splitlines()]


def test_two_models_are_trained_decoded_and_in_the_table(asr1):
    assert rows(asr1, DECODING) == ["org/dev", "test_clean"] * 2
    for exp in EXPS:
        log = (asr1 / exp / DECODING / "test_clean/logdir/asr_inference.1.log").read_text()
        assert "espnet_kv/bin/asr_inference.py" in log  # strict loading, and our decoder


def test_a_second_run_goes_on(asr1):
    work(asr1, "--stage", "13", "--stop_stage", "13", "--asr_config", MHA)


def test_stages_14_and_15_find_what_asr_sh_made(asr1):
    profile = ("--profile_args", "--lengths 3 --utterances 1 --repeats 1")
    both = ("--asr_config", f"{MHA} {LINEAR}")
    work(asr1, "--stage", "14", "--stop_stage", "15", *both, *profile)
    for exp in EXPS:
        found = json.loads((asr1 / exp / "profile/profile.json").read_text())["wer"]
        assert set(found["offline"]) == {"test_clean", "dev"}
    assert (asr1 / "exp/report/report.html").is_file()


def test_streaming(asr1):
    options = ["--stage", "12", "--stop_stage", "13", "--asr_config", LINEAR]
    options += ("--inference_config", "conf/decode_asr_streaming.yaml", "--use_streaming", "true")
    work(asr1, *options, "--test_sets", "test_clean")
    decoding = "decode_asr_streaming_asr_model_valid.acc.ave"
    assert rows(asr1, decoding) == ["test_clean"]
    assert read_scored_set(asr1 / EXPS[1] / decoding / "test_clean").how.streaming


def test_a_language_model_and_an_experiment_of_ones_own_name(asr1):
    lm = ["--use_lm", "true", "--lm_config", "conf/train_lm_small.yaml"]
    lm += ("--lm_args", "--max_epoch 1 --keep_nbest_models 1", "--lm_exp", "models/lm")
    work(asr1, *lm, "--stage", "6", "--stop_stage", "8", "--asr_config", MHA)
    perplexity = float((asr1 / "models/lm/perplexity_test/ppl").read_text())
    assert 2 < perplexity < 120  # the vocabulary has 60 tokens, and there were few updates

    mine = asr1 / "models/mine"
    mine.mkdir()
    for name in ("config.yaml", "valid.acc.ave.pth"):
        shutil.copy(asr1 / EXPS[0] / name, mine)
    options = ["--asr_exp", "models/mine", "--asr_config", MHA, "--test_sets", "test_clean"]
    options += ("--profile_args", "--lengths 3 --utterances 1 --repeats 1")
    work(asr1, *lm, *options, "--stage", "12", "--stop_stage", "15")
    decoding = "decode_asr_fast_lm_lm_valid.loss.ave_asr_model_valid.acc.ave"
    assert rows(asr1, decoding) == ["test_clean"]
    log = (mine / decoding / "test_clean/logdir/asr_inference.1.log").read_text()
    assert "espnet_kv/bin/asr_inference.py" in log and "models/lm/valid.loss.ave.pth" in log
    found = json.loads((mine / "profile/profile.json").read_text())["wer"]
    assert set(found["offline"]) == {"test_clean"}
    assert "models/mine" in (asr1 / "exp/RESULTS.md").read_text()


LOAD = """
import sys
import numpy, espnet_kv
from espnet2.bin.asr_inference import Speech2Text
model = Speech2Text.from_pretrained(sys.argv[1], beam_size=2)
print(type(model.asr_model.encoder).__name__, len(model(numpy.zeros(16000, "float32"))))
"""


def test_a_pack_of_asr_sh_loads_in_a_fresh_process(asr1, tmp_path):
    work(asr1, "--stage", "pack", "--stop_stage", "pack", "--asr_config", LINEAR)
    (pack,) = (asr1 / EXPS[1]).glob("*.zip")
    with zipfile.ZipFile(pack) as opened:
        card = opened.read("README.md").decode()
    assert "import espnet_kv" in card and "test_clean" in card
    call = [sys.executable, "-c", LOAD, str(pack)]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == ["KVConformerEncoder", "1"]


@pytest.mark.parametrize("audio_format", ["flac.ark", "flac"])
def test_a_model_of_asr_sh_is_converted(asr1, audio_format):
    """The dump says of what format it is."""
    dump = f"dump_{audio_format}"
    work(asr1, "--dumpdir", dump, "--audio_format", audio_format, "--stage=3", "--stop_stage=4")
    options = ["--convert_from", str(EXPS[0]), "--attention_type", "mla", "--kv_rank", "8"]
    options += ["--dumpdir", dump, "--expdir", f"exp_{audio_format}", "--stage", "11"]
    work(asr1, *options, "--stop_stage", "13", "--test_sets", "test_clean")
    converted = asr1 / f"exp_{audio_format}" / f"{EXPS[0].name}_mla_r8"
    assert (converted / DECODING / "test_clean/scores.json").is_file()


class TestBothDrivers:
    @pytest.fixture(scope="class")
    def ours(self, asr1) -> Path:
        """Data of our own driver, and its decoding of asr.sh's data with a model of asr.sh."""
        places = ("--datadir", "kv/data", "--dumpdir", "kv/dump", "--expdir", "kv/exp")
        work(asr1, *places, "--stop_stage", "5", "--asr_config", MHA, script="kv_asr.sh")
        copy = asr1 / "kv/exp" / EXPS[0].name
        copy.mkdir(parents=True)
        for name in ("config.yaml", "valid.acc.ave.pth"):
            shutil.copy(asr1 / EXPS[0] / name, copy)
        decode = ("--stage", "12", "--stop_stage", "13", "--expdir", "kv/exp", "--asr_config", MHA)
        work(asr1, *decode, script="kv_asr.sh")
        return asr1 / "kv"

    @pytest.mark.parametrize("name", SETS)
    def test_have_the_same_utterances(self, asr1, ours, name):
        theirs, mine = asr1 / "dump/raw" / name, ours / "dump/raw" / name
        assert keys(theirs / "wav.scp") == keys(mine / "wav.scp")
        for file in ("text", "utt2spk"):
            assert (theirs / file).read_text() == (mine / file).read_text()
        lengths = zip(
            (theirs / "utt2num_samples").read_text().splitlines(),
            (mine / "utt2num_samples").read_text().splitlines(),
            strict=True,
        )
        for one, other in lengths:
            assert abs(int(one.split()[1]) - int(other.split()[1])) <= 1  # of other resamplers

    def test_have_the_same_tokens(self, asr1, ours):
        where = "data/en_token_list/bpe_unigram60"
        tokens = [(place / where / "tokens.txt").read_text() for place in (asr1, ours)]
        assert tokens[0] == tokens[1] and tokens[0].count("\n") == 60

    def test_have_the_same_characters(self, asr1, ours):
        char = ("--token_type", "char", "--stage", "4", "--stop_stage", "5")
        work(asr1, *char)
        places = ("--datadir", "kv/data", "--dumpdir", "kv/dump")
        work(asr1, *char, *places, script="kv_asr.sh")
        where = "data/en_token_list/char/tokens.txt"
        assert (asr1 / where).read_text() == (ours / where).read_text()

    @pytest.mark.parametrize("name", ["test_clean", "org/dev"])
    def test_decode_and_score_alike(self, asr1, ours, name):
        place = Path(EXPS[0].name) / DECODING / name
        theirs, mine = asr1 / "exp" / place, ours / "exp" / place
        for file in ("text", "token", "token_int"):
            assert (theirs / file).read_text().split() == (mine / file).read_text().split()
        values = [
            [float(v) for v in re.findall(r"-?\d+\.\d+", (d / "score").read_text())]
            for d in (theirs, mine)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-3) and values[0]
        for kind in KINDS:
            asr_sh, kv_asr = (read_scored_set(place).rates[kind] for place in (theirs, mine))
            assert (asr_sh.utterances, asr_sh.words) == (kv_asr.utterances, kv_asr.words)
            # sclite weighs substitutions 4 and other errors 3, which may leave more of them
            assert kv_asr.err - 0.051 <= asr_sh.err <= 1.1 * kv_asr.err + 0.051
            assert asr_sh.s_err == pytest.approx(kv_asr.s_err, abs=0.051)
