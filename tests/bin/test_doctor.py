"""`python -m espnet_kv doctor` names what is missing or too old, and how to get it."""

import importlib
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from espnet_kv.bin import doctor

REPO = Path(__file__).parents[1]


@pytest.fixture
def versions(monkeypatch) -> dict[str, str | None]:
    """Packages that are installed in other versions, or not."""
    faked: dict[str, str | None] = {}
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: faked.get(name, real(name)))
    return faked


def lines(capsys) -> list[str]:
    doctor.main()
    return capsys.readouterr().out.splitlines()


def test_an_environment_that_works(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert f"ok     espnet {metadata.version('espnet')}\n" in out
    assert "ok     encoders of ESPnet: kv_conformer, kv_branchformer," in out
    assert "ok     decoders of ESPnet: kv_transformer" in out
    assert "ok     language models of ESPnet: kv_transformer" in out
    assert out.endswith("everything required is there\n") and "error" not in out


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_looks_at_nothing(word, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda: pytest.fail("something was looked at"))
    with pytest.raises(SystemExit, match="0"):
        doctor.main([word])
    assert capsys.readouterr().out.startswith("usage: python -m espnet_kv doctor [-h]")


def test_other_arguments_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda: pytest.fail("something was looked at"))
    assert doctor.main(["--hepl", "x"]) == 1
    assert capsys.readouterr().err == "error: unrecognized arguments: --hepl x (see --help)\n"


def test_every_requirement_has_a_line(capsys):
    text = "\n".join(lines(capsys))
    required, extras = doctor.requirements()
    assert {"espnet", "torch", "huggingface_hub"} <= set(map(doctor.name_of, required))
    assert all(f" {doctor.name_of(one)} " in text for one in required)
    assert "dev" in extras


def test_what_is_missing_or_too_old_is_named_with_the_remedy(versions, capsys):
    versions |= {"espnet": "202509", "soxr": None, "ruff": None}
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert (
        "error  espnet 202509 is too old, 202611 or newer is needed: "
        'pip install -U "espnet[asr,train]>=202611"\n'
    ) in out
    assert 'error  soxr is not installed: pip install -U "soxr"\n' in out
    assert 'note   extra dev lacks ruff: pip install "espnet_kv[dev]"\n' in out
    assert out.endswith("something required is missing or broken\n")


def test_where_there_is_no_clone_pip_knows_it(monkeypatch, tmp_path):
    listed = ["espnet[asr,train]>=202611", "torch", 'ruff; extra == "dev"', "mypy ; extra == 'dev'"]
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "espnet_kv/doctor.py"))
    monkeypatch.setattr(doctor.metadata, "requires", {"espnet_kv": listed}.get)
    assert doctor.requirements() == (listed[:2], {"dev": ["ruff", "mypy"]})


@pytest.mark.parametrize(
    ("version", "least", "kind"),
    [
        ("2.12", "2.12", "ok"),
        ("2.9.1", "2.12", "error"),
        ("2.12.0+cu130", "2.12", "ok"),
        ("202611", "202611", "ok"),
        ("10.0", "9.1", "ok"),
    ],
)
def test_versions_are_compared_by_their_numbers(versions, version, least, kind):
    versions["x"] = version
    assert doctor.package(f"x[y]>={least}")[0] == kind


def test_tools(monkeypatch, capsys):
    places = {"sox": "/usr/bin/sox"}
    monkeypatch.setattr(doctor.shutil, "which", lambda tool, path: places.get(tool))
    said = lines(capsys)
    assert "ok     sox: /usr/bin/sox" in said
    for tool in ("sclite", "flac", "lmplz"):
        assert any(line.startswith(f"note   {tool} is not there: ") for line in said)
    assert said[-1] == "everything required is there"


def test_packages_that_cannot_be_imported(monkeypatch, capsys):
    def broken(name: str):
        raise OSError(f"lib{name}.so: cannot open\nshared object")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "error  torch cannot be imported (OSError: libtorch.so: cannot open shared obj" in out
    assert "error  espnet cannot be imported (OSError: " in out


def test_classes_that_espnet_does_not_know(monkeypatch, capsys):
    from espnet2.tasks.asr import encoder_choices

    monkeypatch.delitem(encoder_choices.classes, "kv_branchformer")
    assert "error  encoders of ESPnet lack kv_branchformer: " in "\n".join(lines(capsys))


def test_without_any_package_it_still_speaks(tmp_path):
    """As in an environment in which nothing was installed."""
    code = """
        import runpy, sys
        for name in ("yaml", "tqdm", "torch", "numpy", "espnet2"):
            sys.modules[name] = None
        sys.argv = ["espnet_kv", "doctor"]
        runpy.run_module("espnet_kv", run_name="__main__")
    """
    env = os.environ | {"PYTHONPATH": str(REPO)}
    call = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(call, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and not ended.stderr
    assert "error  torch cannot be imported (ModuleNotFoundError: " in ended.stdout
    assert "Traceback" not in ended.stdout
