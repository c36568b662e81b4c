"""When a step of the recipe counts as done, and what makes it run again."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys

import pytest

from espnet_kv.errors import UserError
from espnet_kv.files import locked
from espnet_kv.recipe.content import MISSING, Content
from espnet_kv.recipe.runner import forecast, run_steps
from espnet_kv.recipe.steps import Step, Steps


@pytest.fixture
def judge(tmp_path) -> Steps:
    return Steps(Content(tmp_path / "memory.json"))


def make(tmp_path, name="one", **fields) -> Step:
    """A step that writes the file `product`."""
    out = tmp_path / name

    def build() -> None:
        out.mkdir(exist_ok=True)
        (out / "product").write_text("made")

    known = {"stage": 1, "name": name, "output": out, "build": build}
    return Step(**known | {"products": lambda: [out / "product"]} | fields)


def run(judge: Steps, *steps: Step) -> None:
    run_steps(steps, judge, 1, "./run.sh")


class TestState:
    def test_a_step_is_done_until_something_that_it_declares_changes(self, tmp_path, judge):
        source = tmp_path / "source"
        source.write_text("a")
        step = make(tmp_path, options={"fs": 16000}, reads={"text": source})
        assert judge.state(step).reason == "not made yet"
        run(judge, step)
        assert judge.state(step).kind == "done"
        other = dataclasses.replace(step, options={"fs": 8000})
        assert judge.state(other).reason == "--fs was 16000, is 8000"
        source.write_text("other text")
        judge = Steps(Content(tmp_path / "memory.json"))
        assert judge.state(step).reason == f"{source} changed"

    def test_what_comes_after_follows(self, tmp_path, judge):
        first = make(tmp_path, "first", options={"fs": 16000})
        second = make(tmp_path, "second", stage=2, after=[first])
        run(judge, first)
        run(judge, second)
        assert judge.state(second).kind == "done"
        first = dataclasses.replace(first, options={"fs": 8000})
        second = dataclasses.replace(second, after=[first])
        assert judge.state(second).reason == "--fs was 16000, is 8000"
        with pytest.raises(UserError, match=r"second needs first.*--fs was 16000.*--stage 1"):
            run(judge, second)

    def test_another_version_of_the_code_is_another_result(self, tmp_path, judge):
        step = make(tmp_path)
        run(judge, step)
        assert "has a new version" in judge.state(dataclasses.replace(step, version=2)).reason

    @pytest.mark.parametrize("harm", ["delete", "cut"])
    def test_a_lost_product_is_made_again(self, tmp_path, judge, harm):
        step = make(tmp_path)
        run(judge, step)
        if harm == "delete":
            (step.output / "product").unlink()
        else:
            (step.output / "product").write_text("ma")
        assert judge.state(step).kind == "todo"
        run(judge, step)
        assert (step.output / "product").read_text() == "made"

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": 1}'])
    def test_a_damaged_stamp_is_no_stamp(self, tmp_path, judge, content):
        step = make(tmp_path)
        run(judge, step)
        step.stamp_file.write_text(content)
        assert "cannot be read" in judge.state(step).reason

    def test_what_others_made_is_taken_but_a_cut_off_step_is_not(self, tmp_path, judge):
        step = make(tmp_path)
        step.output.mkdir()
        (step.output / "product").write_text("by others")
        assert judge.state(step).kind == "given"
        judge.begin(step)  # and then the machine loses power
        assert judge.state(step).reason == "was cut off"

    def test_killed_while_it_notes_that_it_begins_it_has_made_nothing(self, tmp_path, judge):
        step = make(tmp_path, precious=True, in_place=True)
        step.output.mkdir()
        (step.output / f".partial.{step.begun_file.name}").write_text('{"st')
        assert judge.state(step).reason == "not made yet"
        run(judge, step)
        assert judge.state(step).kind == "done"

    def test_a_changed_training_is_refused_and_a_cut_off_one_goes_on(self, tmp_path, judge):
        step = make(tmp_path, precious=True, in_place=True, options={"lr": 1}, remedy="rename it")
        judge.begin(step)
        (step.output / "checkpoint").write_text("epochs")
        assert judge.state(step).reason == "was cut off"
        other = dataclasses.replace(step, options={"lr": 2})
        with pytest.raises(UserError, match=r"--lr was 1, is 2.*remove it, or rename it"):
            run(judge, other)
        run(judge, step)
        with pytest.raises(UserError, match="--lr was 1, is 2"):
            run(judge, other)

    def test_a_forecast_writes_nothing(self, tmp_path, judge):
        first = make(tmp_path, "first")
        second = make(tmp_path, "second", stage=2, after=[first])
        before = sorted(tmp_path.rglob("*"))
        assert [said for _, said in forecast([first, second], judge, range(1, 3))] == [
            "would run: not made yet",
            "would run: not made yet",
        ]
        assert [said for _, said in forecast([first, second], judge, range(2, 3))] == [
            "cannot run: first (stage 1) is not done"
        ]
        assert sorted(tmp_path.rglob("*")) == before


class TestContent:
    def test_a_copy_that_keeps_size_and_date_is_noticed(self, tmp_path):
        file, memory = tmp_path / "a.wav", tmp_path / "memory.json"
        file.write_bytes(b"first")
        os.utime(file, (1, 1))
        before = Content(memory).of_file(file)
        file.write_bytes(b"other")
        os.utime(file, (1, 1))
        assert Content(memory).of_file(file) != before

    def test_deleted_audio_keeps_its_hash(self, tmp_path):
        (tmp_path / "wav.scp").write_text(f"u {tmp_path}/u.wav\n")
        (tmp_path / "utt2spk").write_text("u s\n")
        (tmp_path / "u.wav").write_bytes(b"audio")
        before = Content(tmp_path / "memory.json").of_audio(tmp_path)
        (tmp_path / "u.wav").unlink()
        assert Content(tmp_path / "memory.json").of_audio(tmp_path) == before
        assert Content(tmp_path / "none").of_audio(tmp_path / "none") == MISSING

    def test_hashes_that_an_older_version_stored_are_known(self, tmp_path):
        memory = tmp_path / "memory.json"
        memory.write_text(json.dumps({f"{tmp_path}/u.wav": [[5, 1, 1, 1], "0123456789abcdef"]}))
        (tmp_path / "wav.scp").write_text(f"u {tmp_path}/u.wav\n")
        (tmp_path / "utt2spk").write_text("u s\n")
        expected = hashlib.sha256(b"0123456789abcdef").hexdigest()[:16]
        assert Content(memory).of_audio(tmp_path) == expected

    def test_hashes_of_audio_written_a_moment_ago_are_stored_for_good(self, tmp_path):
        (tmp_path / "wav.scp").write_text(f"a {tmp_path}/a.wav\n")
        (tmp_path / "utt2spk").write_text("a s\n")
        (tmp_path / "a.wav").write_bytes(b"audio")
        memory = tmp_path / "memory.json"
        Content(memory).of_audio(tmp_path)
        written = memory.stat().st_mtime_ns
        Content(memory).of_audio(tmp_path)
        assert memory.stat().st_mtime_ns == written

    @pytest.mark.parametrize("content", ["", "[1]", "{"])
    def test_a_damaged_memory_is_forgotten(self, tmp_path, content):
        (tmp_path / "memory.json").write_text(content)
        (tmp_path / "file").write_text("x")
        assert len(Content(tmp_path / "memory.json").of_file(tmp_path / "file")) == 16


def hold(output, ready) -> None:
    with locked(output, "./run.sh --stage 3"):
        ready.set()
        signal.pause()


class TestLock:
    @pytest.fixture
    def holder(self, tmp_path):
        spawn = multiprocessing.get_context("spawn")
        ready = spawn.Event()
        process = spawn.Process(target=hold, args=(tmp_path / "out", ready), daemon=True)
        process.start()
        assert ready.wait(60)
        yield process
        process.kill()
        process.join()

    def test_the_second_run_names_the_first(self, tmp_path, holder):
        with (
            pytest.raises(UserError, match=f"process {holder.pid} .*--stage 3.*wait for it"),
            locked(tmp_path / "out", "./run.sh"),
        ):
            pass

    def test_a_killed_run_holds_nothing(self, tmp_path, holder):
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        with locked(tmp_path / "out", "./run.sh"):
            assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock"]
        assert list(tmp_path.iterdir()) == []

    def test_a_step_at_work_is_not_begun_twice(self, tmp_path, judge, holder):
        step = make(tmp_path, "out")
        with pytest.raises(UserError, match=f"process {holder.pid}"):
            run(judge, step)
        assert not step.output.exists()


def test_the_driver_says_what_is_wrong_in_one_line(capsys, monkeypatch, tmp_path):
    from espnet_kv.recipe.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.sh", "--corpus", "nothing"])
    assert main() == 1
    err = capsys.readouterr().err
    assert err.startswith("error: --corpus nothing: unknown") and err.count("\n") == 1
