"""`max_epoch: 0`: the model as it is built is saved, and no data is read."""

import pytest
import torch
from commands import assert_one_line, run
from small_training import options, same, weights, write_data

from espnet_kv.bin.asr_train import main
from espnet_kv.espnet.task import ASRTask


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    for name in ("wav.scp", "text", "speech_shape", "text_shape"):
        (folder / name).unlink()
    return folder


def test_the_model_is_saved_under_the_names_of_averages(data, tmp_path):
    ended = run(main, *options(data, tmp_path, "--max_epoch", "0"))
    assert ended.returncode == 0, ended.stderr
    models = sorted(file.name for file in tmp_path.glob("*.pth"))
    assert models == ["train.loss.ave.pth", "valid.acc.ave.pth"]
    assert same(tmp_path / models[0], tmp_path / models[1])
    model, args = ASRTask.build_model_from_file(model_file=tmp_path / models[1])
    assert args.max_epoch == 0 and args.token_list == ["<blank>", "<unk>", "A", "B", "<sos/eos>"]
    torch.testing.assert_close(dict(model.state_dict()), weights(tmp_path / models[1]))


def test_init_param_is_what_is_saved(data, tmp_path):
    seed = ("--max_epoch", "0", "--seed", "7")
    assert run(main, *options(data, tmp_path / "a", *seed)).returncode == 0
    first = tmp_path / "a/valid.acc.ave.pth"
    given = ("--max_epoch", "0", "--init_param", str(first))
    assert run(main, *options(data, tmp_path / "b", *given)).returncode == 0
    assert same(first, tmp_path / "b/valid.acc.ave.pth")
    torch.save({"encoder.no": torch.zeros(1)}, tmp_path / "other.pth")
    given = ("--max_epoch", "0", "--init_param", str(tmp_path / "other.pth"))
    assert_one_line(run(main, *options(data, tmp_path / "c", *given)), "does not fill the model")
    assert not list(tmp_path.glob("c/*.pth"))
