"""What the README tells a reader to type works, and what it says is there is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from espnet_kv.recipe import options

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
RECIPE = REPO / "egs2/librispeech_100_kv/asr1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_there_are_commands():
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets_exist(command):
    subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=REPO, check=True)


@pytest.mark.parametrize("command", [c for c in commands() if "run.sh" in c or "run_all.sh" in c])
def test_recipe_commands_are_understood(command, monkeypatch):
    """Up to the point where work would begin."""
    monkeypatch.chdir(RECIPE)
    for name in ("LIBRISPEECH", "SPEECHOCEAN762", "FSDD"):
        monkeypatch.delenv(name, raising=False)
    words = shlex.split(command)
    while "=" in words[0]:
        name, value = words.pop(0).split("=")
        monkeypatch.setenv(name, value)
    assert os.access(words[0], os.X_OK)
    monkeypatch.setattr(options, "check_gpus", lambda ngpu, option: None)
    monkeypatch.setattr(options, "name_sources", _any_sources)
    args = options.parse(words[1:])
    copies = {"LIBRISPEECH", "SPEECHOCEAN762", "FSDD"} & {w.split("=")[0] for w in command.split()}
    assert [args.corpus_dir] == ([Path(os.environ[name]) for name in copies] or [None])


def _any_sources(paths, datadir):
    """A reader's own data directories, as if they were there."""
    return {path.name: path.resolve() for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c.endswith("--help")])
def test_help_commands_run(command):
    words = shlex.split(command)
    words[0] = {"python": sys.executable}.get(words[0], words[0])
    env = os.environ | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    ours = {"asr_train": "kv_conformer", "report": "--expdir", "convert": "--kv_rank"}
    assert ours.get(words[-2].rsplit(".", 1)[-1], "--cache_dtype") in ended.stdout


def test_the_yaml_examples_build():
    from espnet2.tasks.asr import decoder_choices, encoder_choices

    config = {}
    for block in blocks("yaml"):
        config |= yaml.safe_load(block)
    encoder = encoder_choices.get_class(config["encoder"])
    encoder(80, num_blocks=1, rel_pos_type="latest", **config["encoder_conf"])
    decoder = decoder_choices.get_class(config["decoder"])
    decoder(100, 256, num_blocks=1, **config["decoder_conf"])


def test_every_folder_has_its_line():
    """docs/layout.md lists the folders that hold code, and no others."""
    layout = (REPO / "docs/layout.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\S+/)` \|", layout, re.MULTILINE))
    for folder in listed:
        assert (REPO / folder).is_dir(), f"docs/layout.md lists {folder}, which is not there"
    folders = {
        f"{path.parent.relative_to(REPO)}/"
        for top in ("espnet_kv", "benchmarks", "scripts", "tests")
        for path in (REPO / top).rglob("*.*")
        if path.suffix in (".py", ".sh")
    }
    assert not folders - listed, f"docs/layout.md lacks {sorted(folders - listed)}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (REPO / target).exists(), target
