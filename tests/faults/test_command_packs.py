"""Packed models that are damaged or not there, failed uploads: one line, nothing half done."""

import re
import shutil
import socket
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from commands import assert_one_line, run
from fake_hub import TOKEN, fake_hub, point_to
from packed import BEST, NAME, experiment, packed
from small_recipe import REPO, leftovers, said
from small_recipe import run as run_recipe

from espnet_kv.errors import UserError
from espnet_kv.espnet.packs import unpacked

PACK = ["--asr_tag", "x", "--test_sets", "test_clean", "--stage", "pack"]
UPLOAD = [*PACK[:-1], "upload", "--hf_repo", "me/model"]
COMMANDS = {
    "stream": ["speech.wav"],
    "asr_inference": ["--data_path_and_name_and_type", "wav.scp,speech,sound"],
    "asr_inference_streaming": ["--data_path_and_name_and_type", "wav.scp,speech,sound"],
    "convert": ["--attention_type", "mla", "--kv_rank", "8"],
    "profile": ["--output", "out/profile.json"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return packed(tmp_path_factory.mktemp("good"))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A reader's directory and, below it, the cache of packs."""
    point_to(monkeypatch, closed(), None, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def closed() -> str:
    """An address where nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def rewritten(good: Path, file: Path, **members: str | None) -> Path:
    """A copy of a pack with other members; None: without it."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            text = members.get(name, old.read(name))
            if text is not None:
                new.writestr(name, text)
        for name in members.keys() - set(old.namelist()):
            new.writestr(name, members[name])
    return file


def flipped(file: Path, name: str) -> None:
    """Change a byte in the middle of a member."""
    with zipfile.ZipFile(file) as pack:
        info = pack.getinfo(name)
    content = bytearray(file.read_bytes())
    content[info.header_offset + info.file_size // 2] ^= 0xFF
    file.write_bytes(content)


class TestPacks:
    def test_what_is_damaged_or_of_another_kind(self, good, home):
        bad = Path("bad.zip")
        meta = yaml.safe_load(zipfile.ZipFile(good).read("meta.yaml"))
        gone = meta | {"files": {"asr_model_file": "exp/none.pth"}}
        tts = meta | {"files": {"model_file": "x"}, "yaml_files": {"train_config": "y"}}
        model = f"exp/{NAME}/{BEST}"

        def changed(**members: str | None) -> object:
            return lambda: rewritten(good, bad, **members)

        def with_meta(content: object) -> object:
            text = content if isinstance(content, str) else yaml.safe_dump(content)
            return changed(**{"meta.yaml": text})

        for make, text in (
            # its end is now that of the model's file, which is a zip as well
            (lambda: bad.write_bytes(good.read_bytes()[:-500]), "no meta.yaml; copy it again"),
            (lambda: bad.write_bytes(good.read_bytes()[:9000]), "is no zip file, or it is damaged"),
            (lambda: bad.write_bytes(b""), "is no zip file, or it is damaged"),
            (lambda: bad.write_text("text"), "is no zip file, or it is damaged"),
            (lambda: (shutil.copy(good, bad), flipped(bad, model)), f"damaged: {model} in it"),
            (changed(**{"meta.yaml": None}), "it has no meta.yaml"),
            (with_meta("a: ["), "its meta.yaml is damaged"),
            (with_meta("files: {}"), "its meta.yaml is damaged"),
            (with_meta("- a"), "its meta.yaml is damaged"),
            (with_meta(gone), r"it has no .*none\.pth"),
            (with_meta(tts), "no asr_train_config"),
            (changed(**{"../../evil": "x"}), "is no packed model: Refusing"),
            (bad.unlink, "does not exist: give the zip"),
            (bad.mkdir, "is a directory"),
        ):
            make()
            with pytest.raises(UserError, match=text) as raised:
                unpacked(str(bad))
            assert str(raised.value).startswith("bad.zip") and "\n" not in str(raised.value)
        cache = home / ".cache/espnet_model_zoo/espnet_kv"
        assert not any(cache.iterdir()) and not Path("evil").exists()

    def test_tags(self, good, home, monkeypatch):
        with pytest.raises(UserError, match=r"me/model cannot be fetched .*: check the network"):
            unpacked("me/model")
        with pytest.raises(UserError, match="a/b/c is neither a file nor a model tag"):
            unpacked("a/b/c")
        with pytest.raises(UserError, match=r"x.zip cannot be fetched .*: check the network"):
            unpacked(f"{closed()}/x.zip")
        with fake_hub() as hub:
            point_to(monkeypatch, hub.endpoint, None, home)
            with pytest.raises(UserError, match=r"me/model: .* has no such model"):
                unpacked("me/model")
            hub.repositories["me/model"] = {"README.md": b"hello"}
            with pytest.raises(UserError, match=r"me/model is no packed model: .* no meta.yaml"):
                unpacked("me/model")
            hub.broken = "me/other"
            with pytest.raises(UserError, match="me/other cannot be fetched"):
                unpacked("me/other")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_says_it_in_one_line(self, good, home, command):
        from packed import recording

        Path("wav.scp").write_text(f"u1 {recording(Path())}\n")
        main = import_module(f"espnet_kv.bin.{command}").main
        options = COMMANDS[command]
        if command not in ("stream", "profile"):
            options = [*options, "--output_dir", "out"]
        both = ["--model_tag", str(good), "--asr_train_config", "config.yaml"]
        Path("config.yaml").write_text("encoder: kv_conformer\n")
        Path("bad.zip").write_text("no zip")
        for more, text in (
            (both, r"--model_tag.*--asr_train_config|give one of .*--model_tag"),
            (["--model_tag", "bad.zip"], "--model_tag: bad.zip is no zip file"),
            ([], "give .*--asr_train_config"),
        ):
            assert_one_line(run(main, *options, *more), text)
            assert not Path("out").exists()

    def test_a_profile_of_a_pack_needs_a_place(self, good, home):
        from espnet_kv.bin.profile import main

        assert_one_line(run(main, "--model_tag", str(good)), "--model_tag: give --output")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    recipe = tmp_path_factory.mktemp("trained")
    experiment(recipe)
    (recipe / "conf").symlink_to(REPO / "conf")
    return recipe


@pytest.fixture
def recipe(trained, home, tmp_path) -> Path:
    """Where an untouched model is, and nobody answers on the network."""
    shutil.copytree(trained, tmp_path / "recipe", symlinks=True)
    return tmp_path / "recipe"


class TestPacking:
    def test_what_is_missing_or_damaged_is_named_and_nothing_is_left(self, recipe):
        exp = recipe / "exp" / NAME
        config = exp / "config.yaml"
        whole = config.read_text()
        (exp / "profile").mkdir()
        for file, content, text in (
            (exp / "profile/profile.json", "{", "profile.json: .*: remove it and profile again"),
            (
                exp / "profile/profile.json",
                '{"cache": 1}',
                "profile.json: .*: remove it and profile again",
            ),
            (exp / "run.json", "[]", "run.json is damaged"),
            (config, whole + "bpemodel: gone/bpe.model\n", "bpemodel: gone/bpe.model is neither"),
            (config, "a: [", "config.yaml is not a YAML"),
        ):
            before = file.read_text() if file.exists() else None
            file.write_text(content)
            assert re.search(text, said(run_recipe(recipe, *PACK)))
            assert not list(exp.glob("*.zip")) and not list(exp.glob(".packing*"))
            file.unlink() if before is None else file.write_text(before)
        model = exp / BEST
        model.rename(exp / "other.pth")
        assert "train first (stage 11)" in said(run_recipe(recipe, *PACK))
        assert run_recipe(recipe, *PACK, "--inference_asr_model", "other.pth")[0] == 0

    def test_a_failed_packing_leaves_the_former_pack_and_the_next_run_goes_on(
        self, recipe, monkeypatch
    ):
        exp = recipe / "exp" / NAME
        assert run_recipe(recipe, *PACK)[0] == 0
        (file,) = exp.glob("*.zip")
        before = file.read_bytes()
        (exp / "config.yaml").open("a").write("more: 1\n")

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr("espnet_kv.recipe.packing.add_card", full)
            assert "No space left" in said(run_recipe(recipe, *PACK))
        assert file.read_bytes() == before and not list(exp.glob(".packing*"))
        (exp / ".packing.partial_of_a_killed_run").mkdir()
        assert run_recipe(recipe, *PACK)[0] == 0
        assert file.read_bytes() != before and leftovers(exp) == []


class TestUpload:
    @pytest.fixture
    def ready(self, recipe) -> Path:
        assert run_recipe(recipe, *PACK)[0] == 0
        return recipe

    def test_before_anything_is_packed(self, recipe, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert "run stage 16 first" in said(run_recipe(recipe, *UPLOAD))

    def test_every_failure_is_one_line_and_the_next_run_uploads(self, ready, home, monkeypatch):
        assert "no token for the upload: log in" in said(run_recipe(ready, *UPLOAD))
        point_to(monkeypatch, closed(), TOKEN, home)
        assert "cannot be reached" in said(run_recipe(ready, *UPLOAD))
        with fake_hub() as hub:
            point_to(monkeypatch, hub.endpoint, "hf_wrong", home)
            assert "refuses the token (status 401)" in said(run_recipe(ready, *UPLOAD))
            point_to(monkeypatch, hub.endpoint, TOKEN, home)
            hub.broken = "/commit/"
            assert "not uploaded (" in said(run_recipe(ready, *UPLOAD))
            exp = ready / "exp" / NAME
            assert not list(exp.glob(".*uploaded.done.json")) and not list(exp.glob(".packing*"))
            assert not hub.repositories["me/model"]
            hub.broken = None
            assert run_recipe(ready, *UPLOAD)[0] == 0
            assert f"exp/{NAME}/{BEST}" in hub.repositories["me/model"]
            assert leftovers(exp) == []
