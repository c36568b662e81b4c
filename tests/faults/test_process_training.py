"""A training that was killed, ran out of disk or diverged: what is kept, and what is said.

Every training is ESPnet's own trainer in a fork of the test's process.
"""

import os
import pickle
import resource
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from commands import Forked, assert_one_line, run
from espnet2.tasks.abs_task import AbsTask
from small_training import lm_options, options, same, weights, write_data

from espnet_kv.bin import asr_train, lm_train
from espnet_kv.errors import UserError
from espnet_kv.espnet import saving
from espnet_kv.espnet.training import ASRTraining  # the forks have ESPnet loaded, then
from espnet_kv.recipe.train import check_models

AVERAGE = "valid.acc.ave.pth"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """A training of three epochs that nothing disturbed."""
    exp = tmp_path_factory.mktemp("exp") / "undisturbed"
    ended = run(asr_train.main, *options(data, exp))
    assert ended.returncode == 0, ended.stderr
    assert (exp / AVERAGE).exists() and not (exp / saving.PREVIOUS).exists()
    return exp


def killed_while(saves: str, written: int = 100):
    """asr_train that is killed while it saves a file: after some bytes, before others."""

    def main(arguments: list[str]) -> int:
        save = torch.save

        def dying(obj, f, *args, **kwargs):
            name = Path(getattr(f, "name", f)).name
            if saves in name:
                with open(getattr(f, "name", f), "wb") as cut:
                    cut.write(b"x" * written)
                os._exit(137)
            save(obj, f, *args, **kwargs)

        torch.save = dying
        return asr_train.main(arguments)

    return main


@pytest.fixture(scope="module")
def killed_in_epoch_3(data, tmp_path_factory) -> Path:
    """An experiment with a checkpoint of its third epoch, but without the model."""
    exp = tmp_path_factory.mktemp("killed") / "exp"
    ended = run(killed_while("3epoch.pth"), *options(data, exp))
    assert ended.returncode == 137, ended.stderr
    return exp


@pytest.fixture
def begun(killed_in_epoch_3, tmp_path) -> Path:
    """An experiment after its first two epochs."""
    exp = Path(shutil.copytree(killed_in_epoch_3, tmp_path / "exp", symlinks=True))
    (exp / "checkpoint.pth").unlink()
    (exp / saving.PREVIOUS).rename(exp / "checkpoint.pth")
    return exp


def finish(data: Path, exp: Path) -> str:
    """Run the training again, to its end; what it warned of."""
    ended = run(asr_train.main, *options(data, exp))
    assert ended.returncode == 0, ended.stderr
    assert not list(exp.glob(".partial*"))
    return "\n".join(line for line in ended.stderr.splitlines() if line.startswith("warning: "))


@pytest.mark.parametrize(
    "saves",
    ["checkpoint.pth", "2epoch.pth", "3epoch.pth", "valid.acc.ave_2best.pth"],
)
def test_a_training_killed_while_it_saved_ends_as_if_it_had_not_been(
    saves, data, undisturbed, tmp_path
):
    exp = tmp_path / "exp"
    first = run(killed_while(saves), *options(data, exp))
    assert first.returncode == 137, first.stderr
    finish(data, exp)
    for file in ("3epoch.pth", AVERAGE, "train.loss.ave.pth", "latest.pth", "valid.acc.best.pth"):
        assert same(exp / file, undisturbed / file), file


def test_epochs_are_not_lost_with_a_checkpoint_that_was_cut(
    data, undisturbed, killed_in_epoch_3, tmp_path
):
    exp = Path(shutil.copytree(killed_in_epoch_3, tmp_path / "exp", symlinks=True))
    checkpoint = exp / "checkpoint.pth"
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    said = finish(data, exp)
    assert "checkpoint.pth cannot be read" in said and "goes on from epoch 2" in said
    assert (exp / "checkpoint.damaged.pth").exists()
    assert same(exp / AVERAGE, undisturbed / AVERAGE)


def test_a_training_without_any_whole_checkpoint_starts_again_and_says_so(data, undisturbed, begun):
    (begun / "checkpoint.pth").write_bytes(b"")
    said = finish(data, begun)
    assert "the training starts again from epoch 1" in said
    assert same(begun / AVERAGE, undisturbed / AVERAGE)


@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut"])
def test_the_last_epochs_model_is_written_again(cut, data, undisturbed, begun):
    file = begun / "2epoch.pth"
    os.truncate(file, 1000) if cut else file.unlink()
    assert "2epoch.pth was missing or cut, it is written again" in finish(data, begun)
    assert same(begun / AVERAGE, undisturbed / AVERAGE)


@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut"])
def test_a_model_that_the_average_needs_is_asked_for_before_hours_of_training(cut, data, begun):
    file = begun / "1epoch.pth"
    os.truncate(file, 1000) if cut else file.unlink()
    before = (begun / "checkpoint.pth").read_bytes()
    ended = run(asr_train.main, *options(data, begun))
    how = "cannot be read" if cut else "is missing"
    assert_one_line(ended, rf"1epoch\.pth {how}.*needs it: put it back, .*remove ")
    assert "epoch started" not in ended.stderr
    assert (begun / "checkpoint.pth").read_bytes() == before


def test_a_full_disk_keeps_the_checkpoint_before(data, undisturbed, begun):
    before = (begun / "checkpoint.pth").read_bytes()

    def main(arguments):
        # files may grow no further than this, with the error of a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
        return asr_train.main(arguments)

    ended = run(main, *options(data, begun))
    assert_one_line(ended, r"checkpoint\.pth cannot be saved: .*make room.*the same command")
    assert (begun / "checkpoint.pth").read_bytes() == before
    assert not list(begun.glob(".partial*"))
    assert finish(data, begun) == ""
    assert same(begun / AVERAGE, undisturbed / AVERAGE)


def poisoned_from(epoch: int):
    """asr_train whose model loses its numbers in an epoch, as one with too high a rate does."""

    def main(arguments: list[str]) -> int:
        from espnet2.train.trainer import Trainer

        train = Trainer.train_one_epoch.__func__

        def train_and_poison(cls, model, **kwargs):
            ended = train(cls, model=model, **kwargs)
            if kwargs["reporter"].epoch >= epoch:
                for parameter in model.parameters():
                    parameter.data.fill_(float("nan"))
            return ended

        Trainer.train_one_epoch = classmethod(train_and_poison)
        return asr_train.main(arguments)

    return main


def test_a_training_that_diverged_fails_and_keeps_what_was_before(data, tmp_path):
    exp = tmp_path / "exp"
    ended = run(poisoned_from(2), *options(data, exp))
    assert_one_line(ended, r"exp: the training diverged: valid loss is nan in epoch 2: lower lr")
    assert weights(exp / "checkpoint.pth")["reporter"]["epoch"] == 1
    assert not (exp / "2epoch.pth").exists() and not (exp / AVERAGE).exists()


def test_a_checkpoint_that_holds_nan_is_not_gone_on_from(data, begun):
    states = weights(begun / "checkpoint.pth")
    next(iter(states["model"].values())).fill_(float("inf"))
    torch.save(states, begun / "checkpoint.pth")
    ended = run(asr_train.main, *options(data, begun))
    assert_one_line(ended, r"the training diverged: \S+ holds nan or inf in epoch 2.*remove ")


def test_averaged_models_are_checked(undisturbed, tmp_path):
    check_models(undisturbed)
    state = weights(undisturbed / AVERAGE)
    key = next(key for key, value in state.items() if value.is_floating_point())
    state[key] = state[key] * float("nan")
    model = tmp_path / "nan.ave.pth"
    torch.save(state, model)
    with pytest.raises(UserError, match=rf"nan\.ave\.pth: {key} holds nan or inf.*remove "):
        check_models(tmp_path)
    model.write_bytes((undisturbed / AVERAGE).read_bytes()[:2000])
    with pytest.raises(UserError, match=r"nan\.ave\.pth is not a model file, or it is damaged"):
        check_models(tmp_path)


def test_a_language_model_is_saved_as_safely(data, tmp_path):
    given = lm_options(data, tmp_path / "whole")
    ended = run(lm_train.main, *given)
    assert ended.returncode == 0, ended.stderr

    def killed(arguments):
        save = torch.save

        def dying(obj, f, *args, **kwargs):
            if "2epoch.pth" in str(getattr(f, "name", f)):
                os._exit(137)
            save(obj, f, *args, **kwargs)

        torch.save = dying
        return lm_train.main(arguments)

    given = lm_options(data, tmp_path / "killed")
    assert run(killed, *given).returncode == 137
    ended = run(lm_train.main, *given)
    assert ended.returncode == 0, ended.stderr
    assert same(tmp_path / "whole/valid.loss.ave.pth", tmp_path / "killed/valid.loss.ave.pth")


def test_a_process_that_espnet_spawns_saves_safely_too(monkeypatch):
    """Where there are several GPUs, ESPnet sends main_worker to a new process for each."""
    saves = []
    worker = classmethod(lambda cls, args: saves.append(torch.save))
    monkeypatch.setattr(AbsTask, "main_worker", worker)
    sent = pickle.loads(ForkingPickler.dumps(ASRTraining.main_worker))
    assert sent.__self__ is ASRTraining
    before = torch.save
    sent(ASRTraining.get_parser().parse_args([]))
    assert saves != [before] and torch.save is before


def test_torch_is_left_as_it_was():
    save = torch.save
    with pytest.raises(KeyError), saving.safe_saves():
        assert torch.save is not save
        raise KeyError
    assert torch.save is save


def test_statistics_and_help_touch_no_experiment(data, begun):
    """--collect_stats with the same directory is no training: nothing is mended there."""
    (begun / "1epoch.pth").unlink()
    before = sorted(path.name for path in begun.iterdir())
    ended = Forked(asr_train.main, options(data, begun, "--dry_run", "true")).finish()
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in begun.iterdir()) == before
    shutil.rmtree(begun)
