"""Paths that shells and parsers read otherwise, and experiments that are used from elsewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_recipe import REPO, leftovers, make_recipe, run

STRANGE = ("a b", "run #1, 'q'", "$(touch pwned)", "-n", 'say "x"; ls', "ärger%20", "x[0]")
RECIPE = REPO / "egs2/librispeech_100_kv/asr1"


@pytest.mark.slow
def test_every_stage_works_below_a_strange_name(tmp_path):
    """Data, dump and experiments below all names at once, with a language model."""
    options = make_recipe(tmp_path)
    place = "/".join(STRANGE)
    strange = [f"--{name}dir={place}/{name}" for name in ("data", "dump", "exp")]
    code, out, err = run(
        tmp_path, *options, *strange, "--stop_stage", "13", "--use_lm=true", "--lm_config=lm.yaml"
    )
    assert code == 0, out + err
    assert not list(tmp_path.rglob("pwned"))
    assert "|3|6|" in (tmp_path / place / "exp/RESULTS.md").read_text()
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("trained")
    options = make_recipe(folder)
    bpe = [*options, "--token_type", "bpe", "--nbpe", "14"]
    code, out, err = run(folder, *bpe, "--stop_stage", "11")
    assert code == 0, out + err
    return folder, bpe


def test_a_moved_experiment_works_from_any_directory(trained, tmp_path, monkeypatch):
    """Statistics, tokens and BPE model come with it: nothing of the recipe is needed."""
    folder, _ = trained
    (exp,) = folder.glob("exp/asr_train*")
    moved = tmp_path / "moved"
    shutil.copytree(exp, moved, symlinks=True)
    monkeypatch.chdir(tmp_path)
    from espnet_kv.espnet.task import ASRTask

    model, _ = ASRTask.build_model_from_file(moved / "config.yaml", moved / "valid.acc.ave.pth")
    assert model.normalize.mean.abs().sum() > 0
    assert (moved / "bpe.model").is_file() and (moved / "tokens.txt").is_file()


def test_a_copied_experiment_is_decoded_but_not_trained_on(trained, tmp_path):
    folder, options = trained
    (exp,) = folder.glob("exp/asr_train*")
    expdir = tmp_path / "exp"
    shutil.copytree(exp, expdir / exp.name, symlinks=True)
    for file in (expdir / exp.name).glob(".*"):
        file.unlink()
    only = (*options, "--expdir", str(expdir), "--dry_run", "true", "--stop_stage", "12")
    code, out, _ = run(folder, *only, "--stage", "11")
    assert code == 0 and "would be refused: it was not made by this recipe" in out
    code, out, _ = run(folder, *only, "--stage", "12")
    assert code == 0 and "would run: not made yet" in out


class TestShell:
    @pytest.fixture
    def clone(self, tmp_path) -> Path:
        """The recipe below a folder with a space, without the package beside it."""
        asr1 = tmp_path / "my clone/egs2/librispeech_100_kv/asr1"
        shutil.copytree(RECIPE, asr1, ignore=shutil.ignore_patterns("conf", "data", "dump", "exp"))
        (asr1 / "conf").symlink_to(REPO / "conf")
        shutil.copy(REPO / "Makefile", tmp_path / "my clone")
        return asr1

    def sh(self, asr1: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
        known = {"PATH": "/usr/bin:/bin", "HOME": str(asr1), "PYTHONPATH": str(REPO)}
        return subprocess.run(words, cwd=asr1, env=known | env, capture_output=True, text=True)

    def test_a_clone_below_a_folder_with_a_space(self, clone):
        ended = self.sh(clone, "./run.sh", "--stage=9", "--stop_stage=9", python=sys.executable)
        assert ended.returncode == 0, ended.stderr
        assert "skipped (--use_ngram false)" in ended.stdout

    def test_an_interpreter_in_a_folder_with_a_space(self, clone, tmp_path):
        python = tmp_path / "my python/python3"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        ended = self.sh(clone, "./run.sh", "--stage", "9", "--stop_stage", "9", python=str(python))
        assert ended.returncode == 0, ended.stderr

    def test_without_espnet_it_says_what_to_type(self, clone, tmp_path):
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
        (tools / "python3").chmod(0o755)
        ended = self.sh(clone, "./run.sh", "--stage", "1", PATH=f"{tools}:/usr/bin:/bin")
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
        assert ended.stderr.startswith("error: no Python with ESPnet was found")
        assert "make -C" in ended.stderr and " env" in ended.stderr and ended.stdout == ""

    @pytest.mark.parametrize("script", ["run.sh", "run_all.sh", "kv_asr.sh", "local/data.sh"])
    def test_every_script_is_valid(self, script):
        assert subprocess.run(["bash", "-n", RECIPE / script]).returncode == 0


SCRIPTS = sorted([*RECIPE.rglob("*.sh"), *(REPO / "scripts").glob("*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_nothing_needs_a_newer_bash_than_3_2(script):
    """What macOS ships: an empty array under `set -u` is an error there, and more is unknown."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", script.read_text())
    unguarded = re.sub(r'\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}', "", text)
    filled = set(re.findall(r"(\w+)=\([^)\s]", text))
    assert set(re.findall(r"\$\{(\w+)\[[@*]\]\}", unguarded)) <= filled
    newer = (
        *(r"\b(mapfile|readarray)\b", "declare -A", "local -n", r"\$\{\w+(\^\^?|,,?)\}"),
        *("&>>", r"\|&", "wait -n", r"\[\[ -v"),
    )
    assert not re.search("|".join(newer), text)
