"""Two processes under torchrun train as one process with the same total batch.

In float64, because 50 updates can amplify the rounding of float32 to 0.05 (ESPnet's Branchformer
and ours alike).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run
from small_encoders import ATTENTIONS, NO_DROPOUT, SIZES
from small_training import (
    CONFIG,
    config_options,
    largest_difference,
    update_losses,
    write_data,
)
from torch import Tensor, distributed, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.nn.functional import all_reduce

from espnet_kv.bin import asr_train
from espnet_kv.espnet import training  # noqa: F401  the forks have ESPnet loaded, then

UPDATES = 50


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Utterances of one length: each process has as many frames and tokens as the other."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, [16000] * 10)
    return folder


def torchrun(arguments: list[str]) -> int:
    """asr_train in the processes of `torchrun --standalone --nproc_per_node 2`."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    two = ["--dist_backend", "gloo", "--multiprocessing_distributed", "false"]
    return max(elastic_launch(launch, asr_train.main)([*arguments, *two]).values())


def train(
    encoder: str, processes: int, conf: dict[str, Any], data: Path, folder: Path
) -> list[float]:
    """The losses of a training without dropout, in batches of four utterances in all."""
    sizes = {"output_size": 16, "attention_heads": 4, "num_blocks": 1}
    no_dropout = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0}
    config = {
        "encoder": encoder,
        "encoder_conf": sizes | SIZES[f"kv_{encoder.removeprefix('kv_')}"] | NO_DROPOUT | conf,
        "decoder_conf": CONFIG["decoder_conf"] | no_dropout,
        "optim_conf": {"lr": 0.002},
        "batch_size": 4,
        "num_iters_per_epoch": UPDATES,
        "max_epoch": 1,
        "train_dtype": "float64",
    }
    exp = folder / f"{encoder}{processes}"
    ended = run(asr_train.main if processes == 1 else torchrun, *config_options(config, data, exp))
    assert ended.returncode == 0, ended.stderr
    assert yaml.safe_load((exp / "config.yaml").read_text())["distributed"] is (processes == 2)
    losses = update_losses(exp)
    assert len(losses) == UPDATES and losses[-1] < 0.8 * losses[0]
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "mla", "gqa", "linear"])
def test_two_processes_have_the_losses_of_one(attention, data, tmp_path):
    one, two = (
        train("kv_branchformer", processes, ATTENTIONS[attention], data, tmp_path)
        for processes in (1, 2)
    )
    print(f"{attention}: {largest_difference(one, two):.1e}")
    assert largest_difference(one, two) < 1e-3


@pytest.mark.slow
def test_two_processes_have_the_losses_of_two_with_the_stock_conformer(data, tmp_path):
    """In a Conformer two processes differ from one: each normalises by its part of the batch.

    Its BatchNorm is ESPnet's; Branchformers have LayerNorm.
    """
    ours, stock = (
        train(encoder, 2, {"use_sdpa": True}, data, tmp_path)
        for encoder in ("kv_conformer", "conformer")
    )
    print(f"conformer: {largest_difference(ours, stock):.1e}")
    assert largest_difference(ours, stock) < 1e-5


class WholeBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d with the mean and variance of the batches of all processes.

    torch's SyncBatchNorm does this on GPUs only, and ESPnet does not use it.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T)
        if not (self.training and distributed.is_initialized()):
            return super().forward(x)
        batch = x.transpose(0, 1).flatten(1)  # (C, B T)
        sums = torch.stack([batch.sum(1), batch.square().sum(1), torch.ones_like(batch).sum(1)])
        total, squares, number = all_reduce(sums)
        mean, square = total / number, squares / number
        scale = self.weight / (square - mean.square() + self.eps).sqrt()
        return (x - mean[:, None]) * scale[:, None] + self.bias[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "mla", "gqa", "linear"])
def test_two_processes_have_the_losses_of_one_where_a_conformer_has_the_norms_of_the_whole_batch(
    attention, data, tmp_path, monkeypatch
):
    """Nothing but the BatchNorm tells two processes from one."""
    one = train("kv_conformer", 1, ATTENTIONS[attention], data, tmp_path)
    monkeypatch.setattr(nn, "BatchNorm1d", WholeBatchNorm)
    two = train("kv_conformer", 2, ATTENTIONS[attention], data, tmp_path)
    print(f"conformer {attention}: {largest_difference(one, two):.1e}")
    assert largest_difference(one, two) < 1e-5
