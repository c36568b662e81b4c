"""The shell around the recipe: the search for an environment."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


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
