"""The shell around the recipe: environment search, and the hand-over inside an ESPnet checkout."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
RECIPE = REPO / "egs2/librispeech_100_kv/asr1"


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files that scripts/environment.sh needs, in a clone without .venv."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPO / "scripts/environment.sh", tmp_path / "scripts")
    shutil.copy(REPO / "setup.py", tmp_path)
    return tmp_path


def environment(clone: Path, path: str) -> subprocess.CompletedProcess:
    """Run scripts/environment.sh where only `path` leads to Pythons."""
    tools = clone / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("bash", "dirname", "ls", "rm", "cat", "cksum", "grep", "cut"):
        if not (tools / tool).exists():
            (tools / tool).symlink_to(shutil.which(tool))
    env = {"PATH": f"{path}:{tools}" if path else str(tools), "HOME": str(clone)}
    return subprocess.run(
        [tools / "bash", clone / "scripts/environment.sh"], env=env, capture_output=True, text=True
    )


class TestEnvironment:
    def test_without_a_fitting_python_it_says_what_to_install(self, clone):
        script(clone / "old/python3", "exit 1")  # answers every question with no
        ended = environment(clone, str(clone / "old"))
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: no Python 3.12 or newer")
        assert len(ended.stderr.splitlines()) == 1 and ended.stdout == ""

    def test_an_active_environment_with_espnet_is_used(self, clone):
        python = Path(sys.executable).parent / "python3"
        ended = environment(clone, str(python.parent))
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.strip() == str(python)
        assert not (clone / ".venv").exists()

    def test_a_python_that_only_pyenv_knows_is_found(self, clone):
        script(clone / "old/python3", "exit 1")
        script(clone / "old/pyenv", f"echo {clone}/pyenv")
        log = clone / "log"
        # stands in for an interpreter: fits, makes a "virtual environment", installs nothing
        inner = f'echo "$@" >>{log}; [ "$1" != - ]'
        make_venv = (
            f'echo "$@" >>{log}\n'
            f'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp {clone}/inner "$3/bin/python"; fi'
        )
        script(clone / "inner", inner)
        for tool in ("mkdir", "cp"):
            (clone / "old" / tool).symlink_to(shutil.which(tool))
        script(clone / "pyenv/versions/3.12.9/bin/python", make_venv)
        ended = environment(clone, str(clone / "old"))
        assert "making" in ended.stderr and "3.12.9" in ended.stderr
        assert f"-m venv {clone}/.venv" in log.read_text()
        assert "pip install" in log.read_text()


class TestInsideAnESPnetCheckout:
    @pytest.fixture
    def checkout(self, tmp_path) -> Path:
        """An ESPnet checkout as far as run.sh looks, with an asr.sh that prints its arguments."""
        template = tmp_path / "egs2/TEMPLATE/asr1"
        script(template / "asr.sh", 'printf "%s\\n" "$@"')
        for name in ("path.sh", "cmd.sh"):
            (template / name).write_text("")
        for name in ("scripts", "pyscripts"):
            (template / name).mkdir()
        asr1 = tmp_path / "egs2/librispeech_100_kv/asr1"
        ignore = shutil.ignore_patterns("conf", "data", "dump", "exp", "demo", "downloads")
        shutil.copytree(RECIPE, asr1, ignore=ignore)
        (asr1 / "conf").symlink_to(REPO / "conf")
        return asr1

    def run(self, asr1: Path, *options: str, python: str = "python3") -> list[str]:
        env = os.environ | {"python": python}
        if "--stop_stage" not in options:
            options = (*options, "--stop_stage", "13")
        ended = subprocess.run(
            ["./run.sh", *options], cwd=asr1, env=env, capture_output=True, text=True, check=True
        )
        return ended.stdout.splitlines()

    def test_its_asr_sh_gets_the_options_and_our_python(self, checkout):
        said = self.run(
            checkout, "--stage", "11", "--asr_config", "conf/train_asr_conformer_mla.yaml"
        )
        options = dict(zip(said[::2], said[1::2], strict=True))
        assert options["--python"] == "python3 -m espnet_kv"
        assert options["--stage"] == "11"
        # the later one wins in asr.sh
        assert options["--asr_config"] == "conf/train_asr_conformer_mla.yaml"
        assert (checkout / "asr.sh").is_symlink() and (checkout / "pyscripts").is_dir()

    @pytest.mark.parametrize(
        ("streaming", "config"), [("true", "decode_asr_streaming"), ("false", "decode_asr")]
    )
    def test_streaming_has_its_own_decoding_options(self, checkout, streaming, config):
        said = self.run(checkout, "--use_streaming", streaming)
        options = dict(zip(said[::2], said[1::2], strict=True))
        assert options["--use_streaming"] == streaming
        assert options["--inference_config"] == f"conf/{config}.yaml"

    def test_stages_after_its_own_are_ours(self, checkout):
        said = self.run(
            checkout,
            *("--stage", "12", "--stop_stage", "14", "--asr_config", "conf/x.yaml"),
            *("--profile_args", "--utterances 5"),
            python="echo",
        )
        theirs, ours = said[:-1], said[-1]
        options = dict(zip(theirs[::2], theirs[1::2], strict=True))
        assert (options["--stage"], options["--stop_stage"]) == ("12", "13")
        assert "--profile_args" not in options
        assert ours == (
            "-m espnet_kv.recipe --stage 14 --asr_config conf/x.yaml "
            "--profile_args --utterances 5 --stop_stage 14"
        )

    def test_without_its_stages_its_script_is_not_asked(self, checkout):
        (ours,) = self.run(checkout, "--stage", "14", "--stop_stage", "14", python="echo")
        assert ours == "-m espnet_kv.recipe --stage 14 --stop_stage 14"

    def test_the_name_of_its_only_corpus_is_not_passed_on(self, checkout):
        assert "--corpus" not in self.run(checkout, "--corpus", "librispeech_100")
