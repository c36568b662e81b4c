"""Failures of the machine: disks, permissions, memory, signals, readers that went away."""

import argparse
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import Forked, assert_one_line, run
from profile_json import make_profile, write_profile
from small_models import save
from small_sources import write_audio

from espnet_kv.bin import asr_inference, asr_inference_streaming, convert, profile, report
from espnet_kv.cli import command
from espnet_kv.convert import experiment
from espnet_kv.errors import UserError
from espnet_kv.files import new_directory, new_entries, new_file

ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(folder, encoder_conf={"attention_type": "mha", "attention_conf": None})
    write_audio(folder / "audio")
    return folder


def arguments(model: Path, out: Path) -> dict:
    files = ["--asr_train_config", f"{model}/config.yaml"]
    files += ["--asr_model_file", f"{model}/model.pth"]
    data = ["--data_path_and_name_and_type", f"{model}/audio/wav.scp,speech,sound"]
    data += ["--output_dir", str(out), "--num_workers", "0", "--beam_size", "2"]
    mla = ["--output_dir", str(out), "--attention_type", "mla", "--kv_rank", "4"]
    return {
        "offline": (asr_inference.main, [*files, *data]),
        "streaming": (asr_inference_streaming.main, [*files, *data]),
        "convert": (convert.main, [*files, *mla]),
        "profile": (profile.main, [*files, "--output", str(out)]),
    }


WRITERS = tuple(arguments(Path(), Path()))


def one_error(status: int, said: str, capsys) -> None:
    assert_one_line(argparse.Namespace(returncode=status, stderr=capsys.readouterr().err), said)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB; and how to make it read-only."""
    if not ROOT:
        pytest.skip("only root mounts a file system")
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=False)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("name", ["convert", "offline", "streaming"])
def test_a_full_disk_is_told_and_leaves_nothing(name, model, small_disk, capsys):
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"0" * 512):
            pass
    main, options = arguments(model, small_disk / "out")[name]
    one_error(main(options), f"{small_disk}/.*No space left on device: free space", capsys)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    if name != "convert":  # which needs more than there is
        assert main(options) == 0


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk_is_told_before_the_work(name, model, small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    main, options = arguments(model, small_disk / "out")[name]
    one_error(main(options), f"{small_disk} cannot be written to", capsys)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_where_a_directory_is_needed(name, model, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    main, options = arguments(model, tmp_path / "file/out")[name]
    one_error(main(options), f"{tmp_path}/file is not a directory", capsys)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("way", ["read-only", "full", "file"])
def test_a_report_that_cannot_be_written(way, small_disk, tmp_path, capsys):
    source = write_profile(tmp_path / "a/profile/profile.json", make_profile())
    out = small_disk / "report"
    if way == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    if way == "file":
        out.write_text("x")
    one_error(report.main([str(source), "--output", str(out)]), f"{small_disk}", capsys)
    assert not list(small_disk.rglob("*.partial*")) and not list(small_disk.rglob("*.html"))


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (UserError("a\n  b"), 1, "error: a b\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 1, "error: x/y: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 1, "error: x/y: Permission"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "error: x: No such file: check"),
        (MemoryError(), 1, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "error: out of memory (CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 1, "error: out of memory"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_failures_of_the_machine_are_one_line(failure, status, said):
    @command
    def main(_):
        raise failure

    ended = run(main)
    assert ended.returncode == status
    assert ended.stderr.startswith(said) and len(ended.stderr.splitlines()) == bool(said)


@pytest.mark.parametrize("fault", [RuntimeError("shapes differ"), KeyError("x"), AssertionError()])
def test_faults_of_the_program_keep_their_traceback(fault):
    @command
    def main():
        raise fault

    with pytest.raises(type(fault)):
        main()


@pytest.mark.parametrize("name", ["offline", "convert"])
def test_a_reader_that_goes_away_is_no_fault(name, model, tmp_path):
    """`... | head -1`: convert prints its progress there; a decoding prints nothing."""
    main, options = arguments(model, tmp_path / "out")[name]
    child = Forked(main, options)
    child.stdout.close()
    child.stdin.close()
    said = child.stderr.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    assert "Traceback" not in said and status == (0 if name == "offline" else 141)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_was_stopped_can_be_made_again(number, model, tmp_path, monkeypatch):
    main, options = arguments(model, tmp_path / "out")["convert"]
    monkeypatch.setattr(experiment, "write_pages", lambda *_: time.sleep(30))
    child = Forked(main, options)
    until = time.monotonic() + 20
    while not list(tmp_path.glob(".out.partial/conversion.json")):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(child.pid, number)
    ended = child.finish()
    assert "Traceback" not in ended.stderr and not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert ended.returncode == 130 and ended.stderr.splitlines()[-1] == "error: interrupted"
        assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    assert main(options) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("new", [new_directory, new_entries, new_file])
def test_results_appear_whole_or_not_at_all(new, tmp_path):
    place = tmp_path / "out"
    with pytest.raises(OSError) as caught, new(place) as partial:
        if new is not new_file:
            (partial / "a").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(place) and not any(tmp_path.iterdir())


def test_what_lies_beside_new_results_stays(tmp_path):
    (tmp_path / "out/1best_recog").mkdir(parents=True)
    (tmp_path / "out/1best_recog/old").write_text("x")
    (tmp_path / "out/log").write_text("x")
    with new_entries(tmp_path / "out") as partial:
        (partial / "1best_recog").mkdir()
        (partial / "1best_recog/text").write_text("new")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1best_recog", "log"]
    assert [p.name for p in (tmp_path / "out/1best_recog").iterdir()] == ["text"]


@pytest.mark.parametrize("name", ["-out", 'run #1, $(touch x) it\'s "b"'])
def test_directories_of_any_name(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, options = arguments(model, Path("OUT"))["convert"]
    options = [*options[:4], f"--output_dir={name}", *options[6:]]
    assert main(options) == 0
    assert {p.name for p in tmp_path.iterdir()} == {name}
    main, options = arguments(model, tmp_path / "decoded")["offline"]
    options[1], options[3] = f"{name}/config.yaml", f"{name}/model.pth"
    options[0:4] = [f"--asr_train_config={options[1]}", f"--asr_model_file={options[3]}"]
    assert main(options) == 0


def test_missing_memory_is_not_asked_for_twice():
    """A process that may take 1 GB more says that in one line, and torch's own text."""
    code = (
        "import resource, sys, torch; from espnet_kv.cli import command\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, used + 10**9))\n"
        "@command\ndef main(): torch.zeros(10**10)\nsys.exit(main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert_one_line(ended, "out of memory .*use shorter audio")
