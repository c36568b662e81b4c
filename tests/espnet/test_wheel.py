"""The installed package without its clone: the files of the wheel, and the recipe from it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import assert_one_line, run
from synth_recipe import SIZES

from espnet_kv.bin.recipe import main

REPO = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
ASR1, ASR = "egs2/librispeech_100_kv/asr1", "egs3/librispeech_100_kv/asr"
GENERATED = (
    f"{ASR1}/data/train/text",
    f"{ASR1}/dump/raw/a.yaml",
    f"{ASR1}/exp/asr/config.yaml",
    f"{ASR1}/asr.sh",
    f"{ASR}/data/a.py",
    f"{ASR}/exp/a/config.yaml",
    f"{ASR}/src/__pycache__/average.cpython-312.pyc",
)


def contents(folder: Path) -> dict[str, tuple[str, bool]]:
    """Path -> text and executable bit of the files of both recipes, through links."""
    found = {}
    for top in ("egs2", "egs3"):
        for parent, _, names in (folder / top).walk(follow_symlinks=True):
            for file in (parent / name for name in names):
                path = str(file.relative_to(folder))
                found[path] = (file.read_text(), os.access(file, os.X_OK))
    return found


def laid_down(folder: Path) -> dict[str, tuple[str, bool]]:
    """The same, where there may be nothing else and no links."""
    assert {path.name for path in folder.iterdir()} == {"egs2", "egs3"}
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    return contents(folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A copy of the clone in which no recipe was run."""
    folder = tmp_path_factory.mktemp("clean") / "clone"
    ignored = re.findall(r"^egs.*/(\S+)$", (REPO / ".gitignore").read_text(), re.MULTILINE)
    generated = shutil.ignore_patterns("__pycache__", *ignored)
    for name in ("egs2", "egs3"):
        shutil.copytree(REPO / name, folder / name, symlinks=True, ignore=generated)
    for name in ("espnet_kv", "tests", "benchmarks"):
        shutil.copytree(REPO / name, folder / name, symlinks=True)
    for name in (*SOURCES, "conf"):
        shutil.copy(REPO / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def expected(clean) -> dict[str, tuple[str, bool]]:
    """All files of the recipes but the results of this project."""
    files = contents(clean)
    del files[f"{ASR1}/RESULTS.md"]
    assert files[f"{ASR1}/run.sh"][1], "executable"
    assert f"{ASR}/conf/asr/tuning/train_asr_conformer_mqa.yaml" in files
    return files


@pytest.fixture(scope="module")
def clone(clean, expected) -> Path:
    """A clone in which recipes were run."""
    folder = Path(shutil.copytree(clean, clean.with_name("used"), symlinks=True))
    for name in GENERATED:
        assert name not in expected
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("generated\n")
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(clone))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the installed package and nothing else."""
    folder = tmp_path_factory.mktemp("site packages")
    pip("install", "--target", str(folder), str(wheel))
    return folder


def pip(command: str, *arguments: str) -> None:
    words = [sys.executable, "-m", "pip", command, "--no-deps", "--no-index", *arguments]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def outside(words: list[str], site: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command with the installed package; ESPnet is that of this Python."""
    env = os.environ | {"PYTHONPATH": str(site), "python": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_wheel_has_the_package_and_the_recipe_and_no_generated_data(wheel, expected):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        str(path.relative_to(REPO))
        for path in (REPO / "espnet_kv").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    page = {f"espnet_kv/report/page.{suffix}" for suffix in ("css", "js", "html.j2")}
    page |= {f"espnet_kv/serve/page.{suffix}" for suffix in ("css", "html", "js")}
    page |= {"espnet_kv/serve/recorder.js"}
    recipe = {f"espnet_kv/{name}" for name in expected}
    assert names == modules | page | recipe | {"espnet_kv/recipe_files.txt"}


@pytest.mark.slow
def test_the_recipe_runs_from_an_installed_package(site, expected, tmp_path):
    command = [sys.executable, "-m", "espnet_kv", "recipe", "my experiments"]
    done = outside(command, site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"my experiments/{ASR1}", f"my experiments/{ASR}"]
    assert laid_down(tmp_path / "my experiments") == expected
    asr1 = tmp_path / "my experiments" / ASR1
    options = outside(["./run.sh", "--help"], site, asr1)
    assert options.returncode == 0 and "--asr_config" in options.stdout, options.stderr
    trial = ["./run.sh", "--corpus", "synth"]
    dry = outside([*trial, "--dry_run", "true"], site, asr1)
    assert dry.returncode == 0 and re.search(r"(?i)stage 1\b", dry.stdout), dry.stderr
    assert laid_down(tmp_path / "my experiments") == expected
    done = outside([*trial, *SIZES, "--stage", "1", "--stop_stage", "1"], site, asr1)
    assert done.returncode == 0, done.stderr
    assert len((asr1 / "data/train_clean_100/text").read_text().splitlines()) == 16


def test_a_clone_lays_down_the_same_files_and_none_of_its_experiments(clone, expected, tmp_path):
    words = [sys.executable, "-m", "espnet_kv", "recipe", str(tmp_path / "new/folder")]
    done = outside(words, clone, tmp_path)
    assert done.returncode == 0, done.stderr
    assert laid_down(tmp_path / "new/folder") == expected


def test_what_is_in_the_way_is_kept_and_named(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        ended = run(main, str(tmp_path / name))
        assert_one_line(ended, f"{name} exists and is not an empty directory: name a new one")
    assert_one_line(run(main, str(tmp_path / "file/x")), "file is not a directory; name another")
    assert_one_line(run(main), "the following arguments are required: DIR")
    monkeypatch.chdir(tmp_path / "empty")
    assert_one_line(run(main, "."), r"\. is the current directory: name a new one in it")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file", "full", "notes"]
    monkeypatch.chdir(tmp_path)
    ended = run(main, "empty")
    assert ended.returncode == 0 and (tmp_path / "empty" / ASR1 / "run.sh").exists()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    copied = []

    def copy(source, target):
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        copied.append(shutil.copyfile(source, target))

    monkeypatch.setattr("espnet_kv.bin.recipe.shutil.copy", copy)
    ended = run(main, str(tmp_path / "new"))
    assert_one_line(ended, "new: No space left on device: free space there")
    assert not list(tmp_path.iterdir())


def test_constraints_name_every_dependency_with_a_version():
    """`make constraints` writes the file."""
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pinned = [re.fullmatch(r"([\w-]+)==[\w.]+", line) for line in lines[1:]]
    assert all(pinned), lines
    names = {match[1] for match in pinned if match}
    setup = (REPO / "setup.py").read_text()
    declared = set(re.findall(r'^\s+"([A-Za-z0-9_-]+)[^"=]*(?:>=[^"]*)?",', setup, re.MULTILINE))
    assert {"espnet", "torch", "pydantic", "pytest"} <= declared
    assert names == declared
