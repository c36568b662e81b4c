"""Stages pack and upload: packs like those of ESPnet's asr.sh, with a card of what was measured."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_hub import TOKEN, fake_hub, point_to
from packed import BEST, NAME, experiment, measured
from scored import score
from small_models import speech
from small_recipe import REPO, leftovers, run, said

from espnet_kv.names import REMARK
from espnet_kv.recipe.layout import Layout
from espnet_kv.recipe.options import parse
from espnet_kv.recipe.packing import packed_model
from espnet_kv.scores import MISSING
from espnet_kv.streaming.recognizer import StreamingRecognizer

ZIP = Path("exp", NAME, f"{NAME}_valid.acc.ave.zip")
PACK = ["--stage", "pack", "--asr_tag", "x", "--test_sets", "test_clean"]
UPLOAD = ["--stage", "upload", *PACK[2:], "--hf_repo", "me/model"]
HELD = ["meta.yaml", "exp/asr_x/config.yaml", "exp/asr_x/valid.acc.ave.pth"]
HELD += ["exp/asr_x/RESULTS.md", "exp/asr_stats/train/feats_stats.npz", "README.md"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A recipe's directory with a model."""
    recipe = tmp_path_factory.mktemp("trained")
    experiment(recipe)
    return recipe


@pytest.fixture
def recipe(trained, tmp_path) -> Path:
    folder = tmp_path / "recipe"
    shutil.copytree(trained, folder)
    (folder / "conf").symlink_to(REPO / "conf")
    return folder


@pytest.fixture
def exp(recipe) -> Path:
    measured(recipe / "exp" / NAME)
    return recipe / "exp" / NAME


def names(file: Path) -> list[str]:
    with zipfile.ZipFile(file) as pack:
        return pack.namelist()


def held(file: Path, name: str) -> str:
    with zipfile.ZipFile(file) as pack:
        return pack.read(name).decode()


def heard(*files: Path) -> str | None:
    (text, *_), *_ = StreamingRecognizer(*files)(speech("ABBA").numpy().astype(np.float32))
    return text


class TestPack:
    def test_it_is_named_and_holds_what_asr_sh_packs_and_the_card(self, recipe, exp):
        code, out, err = run(recipe, *PACK)
        assert code == 0, err
        assert str(ZIP) in out and "stage 17" in out and "skipped (--skip_upload_hf true)" in out
        assert sorted(names(recipe / ZIP)) == sorted(HELD)
        meta = yaml.safe_load(held(recipe / ZIP, "meta.yaml"))
        assert meta["yaml_files"] == {"asr_train_config": "exp/asr_x/config.yaml"}
        assert meta["files"] == {"asr_model_file": f"exp/asr_x/{BEST}"}
        assert leftovers(recipe / "exp") == []

    def test_the_card_shows_how_to_load_it_and_what_was_measured(self, recipe, exp):
        assert run(recipe, *PACK)[0] == 0
        card = held(recipe / ZIP, "README.md")
        settings = yaml.safe_load(card.split("---")[1])
        assert settings["language"] == "en" and settings["datasets"] == ["librispeech_100"]
        assert "pip install espnet_kv" in card and "import espnet_kv" in card
        assert f'from_pretrained("{ZIP.name}")' in card
        # 4 layers x 64 frames x 16 numbers; a chunk of 16 frames more is allocated
        assert "| fp32 | 16.4 | 20.5 |" in card and "| int8 | 4.1 | 5.1 |" in card
        assert (
            f"| test_clean | offline | 5.5 | {MISSING} | decode_asr_asr_model_valid.acc.ave |"
            in card
        )
        assert "| test_clean | streaming | 6.5 |" in card
        assert "Trained with `./run.sh --asr_config x`, commit 0123abc." in card
        assert "Profiled with `" in card
        results = held(recipe / ZIP, "exp/asr_x/RESULTS.md")
        assert "| fp32 | 16.4 | 20.5 |" in results and "### WER" in results

    def test_without_measurements_it_says_so(self, recipe):
        code, out, _ = run(recipe, *PACK)
        assert code == 0 and "has no profile (stage 14)" in out
        assert "Nothing of this model was measured." in held(recipe / ZIP, "README.md")

    def test_unpacked_anywhere_it_loads_from_any_directory(
        self, recipe, exp, tmp_path, monkeypatch
    ):
        assert run(recipe, *PACK)[0] == 0
        with zipfile.ZipFile(recipe / ZIP) as pack:
            pack.extractall(tmp_path / "else/where")
        shutil.rmtree(recipe)
        monkeypatch.chdir("/")
        place = tmp_path / "else/where/exp" / NAME
        assert heard(place / "config.yaml", place / BEST) == "ABBA"

    def test_an_experiment_elsewhere_is_packed_under_relative_names(self, recipe, exp, tmp_path):
        away = tmp_path / "away/exp"
        shutil.move(recipe / "exp", away)
        config = yaml.safe_load((away / NAME / "config.yaml").read_text())
        stats = str(away / "asr_stats/train/feats_stats.npz")
        config["normalize_conf"]["stats_file"] = stats
        (away / NAME / "config.yaml").write_text(yaml.safe_dump(config))
        assert run(recipe, *PACK, "--expdir", str(away))[0] == 0
        file = away / NAME / ZIP.name
        assert {f"asr_x/{BEST}", "asr_x/config.yaml", "train/feats_stats.npz"} <= set(names(file))
        packed = yaml.safe_load(held(file, "asr_x/config.yaml"))
        assert packed["normalize_conf"]["stats_file"] == "train/feats_stats.npz"
        with zipfile.ZipFile(file) as pack:
            pack.extractall(tmp_path / "new")
        shutil.rmtree(away)
        assert heard(tmp_path / "new/asr_x/config.yaml", tmp_path / f"new/asr_x/{BEST}") == "ABBA"

    def test_a_linked_model_is_packed_itself(self, recipe, exp, tmp_path):
        shutil.move(exp / BEST, tmp_path / "model.pth")
        (exp / BEST).symlink_to(tmp_path / "model.pth")
        assert run(recipe, *PACK)[0] == 0
        assert f"exp/asr_x/{BEST}" in names(recipe / ZIP)

    def test_lost_statistics_are_those_of_the_model(self, recipe, exp, tmp_path):
        (recipe / "exp/asr_stats/train/feats_stats.npz").rename(tmp_path / "before.npz")
        assert run(recipe, *PACK)[0] == 0
        with zipfile.ZipFile(recipe / ZIP) as pack:
            pack.extract("exp/asr_stats/train/feats_stats.npz", tmp_path)
        before, now = (
            np.load(tmp_path / name)
            for name in ("before.npz", "exp/asr_stats/train/feats_stats.npz")
        )
        mean = before["sum"] / before["count"]
        np.testing.assert_allclose(now["sum"] / now["count"], mean, rtol=1e-5)

    def test_language_model_and_pieces_are_packed_too(self, recipe, exp):
        config = yaml.safe_load((exp / "config.yaml").read_text())
        config["bpemodel"] = "data/token_list/bpe_unigram9/bpe.model"
        (exp / "config.yaml").write_text(yaml.safe_dump(config))
        (exp / "bpe.model").write_bytes(b"pieces")  # the recipe's copy; the data are gone
        lm = recipe / "exp/lm_y"
        for file, text in (
            ("config.yaml", "lm: kv_transformer\ntoken_list: [a]\n"),
            ("valid.loss.ave.pth", "weights"),
            ("perplexity_test_clean/ppl", "9.5\n"),
            ("images/loss.png", "picture"),
        ):
            (lm / file).parent.mkdir(parents=True, exist_ok=True)
            (lm / file).write_text(text)
        assert run(recipe, *PACK, "--use_lm", "true", "--lm_tag", "y")[0] == 0
        more = ["config.yaml", "valid.loss.ave.pth", "perplexity_test_clean/ppl", "images/loss.png"]
        more = [f"exp/lm_y/{name}" for name in more]
        wanted = [*HELD, *more, "data/token_list/bpe_unigram9/bpe.model"]
        assert sorted(names(recipe / ZIP)) == sorted(wanted)
        meta = yaml.safe_load(held(recipe / ZIP, "meta.yaml"))
        assert meta["files"]["lm_file"] == "exp/lm_y/valid.loss.ave.pth"
        config = yaml.safe_load(held(recipe / ZIP, "exp/lm_y/config.yaml"))
        assert config["lm"] == f"kv_transformer{REMARK}"

    def test_the_name_of_a_whisper_tokenizer_is_no_file(self, recipe, exp):
        config = yaml.safe_load((exp / "config.yaml").read_text())
        names = {"token_type": "whisper_en", "bpemodel": "whisper_en"}
        (exp / "config.yaml").write_text(yaml.safe_dump(config | names))
        assert run(recipe, *PACK)[0] == 0
        packed = yaml.safe_load(held(recipe / ZIP, f"exp/{exp.name}/config.yaml"))
        assert packed["bpemodel"] == "whisper_en"

    def test_it_is_packed_again_when_model_or_figures_changed(self, recipe, exp):
        changes = [
            lambda: (exp / BEST).touch(),
            lambda: (exp / "profile/profile.json").unlink(),
            lambda: score(exp / "decode_other/test_clean", 4.5),
            lambda: (exp / "config.yaml").open("a").write("more: 1\n"),
            lambda: (recipe / ZIP).unlink(),
        ]
        said_again = []
        for change in (lambda: None, lambda: None, *changes):
            change()
            code, out, err = run(recipe, *PACK)
            assert code == 0, err
            said_again.append("up to date" not in out)
        assert said_again == [True, False, False, True, True, True, True]

    @pytest.mark.parametrize(
        ("options", "ran"),
        [
            (["--stage", "15"], False),
            (["--stage", "15", "--skip_packing", "false"], True),
            (["--stage", "16"], True),
            (["--stage", "14", "--stop_stage", "pack", "--skip_packing", "false"], True),
        ],
    )
    def test_it_runs_where_it_is_asked_for(self, recipe, exp, options, ran):
        _, out, _ = run(recipe, *PACK[2:], *options, "--dry_run", "true")
        line = next(line for line in out.splitlines() if "pack asr_x" in line)
        assert ("would run" in line) == ran and ("skipped" in line) != ran

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--stage", "pack", "--skip_packing", "true"], "--stage pack --skip_packing true"),
            (["--stage", "upload", "--skip_upload_hf", "true"], "asks for what the other skips"),
            (["--stage", "upload"], "name the repository with --hf_repo USER/NAME"),
            (["--skip_upload_hf", "false", "--hf_repo", "model"], "is no repository USER/NAME"),
            (["--stage", "packing"], "nor one of profile, compare, pack, upload, export"),
            (["--stage", "19"], "there are stages 1 to 18"),
        ],
    )
    def test_contradictions(self, recipe, options, text):
        assert text in said(run(recipe, *options))

    def test_several_models_have_no_one_repository(self, recipe):
        configs = " ".join(f"conf/train_asr_conformer_{name}.yaml" for name in ("mha", "mla"))
        outcome = run(recipe, "--asr_config", configs, *UPLOAD[:2], "--hf_repo", "me/model")
        assert "upload them one by one" in said(outcome)

    @pytest.mark.parametrize("file", ["valid.acc.ave.pth", "x/y.best.pth", "model"])
    def test_the_name_is_that_of_asr_sh(self, recipe, monkeypatch, file):
        monkeypatch.chdir(recipe)
        args = parse([*PACK, "--inference_asr_model", file])
        shell = 'exp=exp/asr_x; model=$1; echo "${exp}/${exp##*/}_${model%.*}.zip"'
        called = subprocess.run(["bash", "-c", shell, "-", file], capture_output=True, text=True)
        assert str(packed_model(Layout(args), args.asr_config[0])) == called.stdout.strip()


STAND_IN = """#!/bin/bash
printf '%s\\n' "$@" > called
while [ $# -gt 0 ]; do
    case $1 in
        --asr_exp) exp=$2 ;;
        --stage) stage=$2 ;;
        --asr_stats_dir) stats=$2 ;;
    esac
    shift
done
[ -d "${exp}/images" ] && [ -f "${exp}/RESULTS.md" ] || exit 3
[ "${stage}" = 14 ] || exit 0
cp packed.zip "${exp}/${exp##*/}_valid.acc.ave.zip"
"""


class TestInACheckout:
    @pytest.fixture
    def called(self, recipe, exp) -> Path:
        """A pack without a card, which the stand-in for asr.sh gives."""
        assert run(recipe, *PACK)[0] == 0
        with (
            zipfile.ZipFile(recipe / ZIP) as old,
            zipfile.ZipFile(recipe / "packed.zip", "w") as new,
        ):
            for name in old.namelist():
                if name != "README.md":
                    new.writestr(name, old.read(name).replace(REMARK.encode(), b""))
        (recipe / ZIP).unlink()
        (recipe / "asr.sh").write_text(STAND_IN)
        (recipe / "asr.sh").chmod(0o755)
        return recipe / "called"

    def options(self, called: Path) -> dict[str, str]:
        words = called.read_text().splitlines()
        return dict(zip(words[::2], words[1::2], strict=True))

    def test_asr_sh_packs(self, recipe, called):
        code, _, err = run(recipe, *PACK)
        assert code == 0, err
        given = self.options(called)
        assert given["--stage"] == given["--stop_stage"] == "14"
        assert given["--skip_packing"] == "false" and given["--asr_exp"] == "exp/asr_x"
        assert given["--use_lm"] == "false" and given["--test_sets"] == "test_clean"
        assert "pip install espnet_kv" in held(recipe / ZIP, "README.md")
        config = yaml.safe_load(held(recipe / ZIP, "exp/asr_x/config.yaml"))
        assert config["encoder"] == f"kv_conformer{REMARK}"

    def test_asr_sh_uploads(self, recipe, called):
        assert run(recipe, *PACK)[0] == 0
        assert run(recipe, *UPLOAD)[0] == 0
        given = self.options(called)
        assert given["--stage"] == given["--stop_stage"] == "15"
        assert given["--skip_upload_hf"] == "false" and given["--hf_repo"] == "me/model"

    def test_its_failure_is_one_line(self, recipe, exp, called):
        (recipe / "asr.sh").write_text("#!/bin/sh\necho no such thing\nexit 1\n")
        line = said(run(recipe, *PACK))
        assert "stage 14 of asr.sh failed (no such thing); see exp/asr_x/asr_sh_stage14.log" in line


class TestUpload:
    def test_all_files_and_a_card_arrive_once(self, recipe, exp, tmp_path, monkeypatch):
        with fake_hub() as hub:
            point_to(monkeypatch, hub.endpoint, TOKEN, tmp_path / "home")
            assert run(recipe, *PACK)[0] == 0
            code, out, err = run(recipe, *UPLOAD)
            assert code == 0, err
            assert f"{hub.endpoint}/me/model" in out
            files = hub.repositories["me/model"]
            assert sorted(files) == sorted(HELD)
            assert files[f"exp/asr_x/{BEST}"] == (exp / BEST).read_bytes()
            assert 'from_pretrained("me/model")' in files["README.md"].decode()
            hub.requests.clear()
            assert "up to date" in run(recipe, *UPLOAD)[1] and not hub.requests
            score(exp / "decode_other/test_clean", 4.5)
            assert "run stage 16 first" in said(run(recipe, *UPLOAD))
            both = [*PACK, "--skip_upload_hf", "false", "--hf_repo", "me/model"]
            assert run(recipe, *both)[0] == 0
            assert b"decode_other" in hub.repositories["me/model"]["README.md"]
            recognizer = StreamingRecognizer.from_pretrained("me/model", chunk_size=4)
            assert recognizer(speech("BAB").numpy().astype(np.float32))[0][0] == "BAB"

    def test_the_endpoint_of_the_environment_is_used(self, recipe, exp, tmp_path):
        assert run(recipe, *PACK)[0] == 0
        with fake_hub() as hub:
            env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
            env |= {"PYTHONPATH": str(REPO), "HOME": str(tmp_path)}
            call = [sys.executable, "-m", "espnet_kv.recipe", *UPLOAD]
            ended = subprocess.run(call, cwd=recipe, env=env, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            assert sorted(hub.repositories["me/model"]) == sorted(HELD)
