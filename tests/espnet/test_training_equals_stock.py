"""Our encoders with mha train as ESPnet's do: the same losses from the same seed.

A training is two epochs of 25 updates. Its checkpoint after the first is resumed with the other
encoder too.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from espnet2.bin import asr_train as stock_asr_train
from pairwise import pairwise
from small_encoders import SIZES
from small_training import (
    CONFIG,
    config_options,
    largest_difference,
    update_losses,
    weights,
    write_data,
)

from espnet_kv.bin import asr_train

EPOCH = 25  # updates
BATCHES = {
    "unsorted": {"batch_type": "unsorted", "batch_size": 3},
    "numel": {"batch_type": "numel", "batch_bins": 60000},  # two to five utterances
}
DROPOUT = ("dropout_rate", "positional_dropout_rate", "attention_dropout_rate")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Utterances of half a second to one and a half."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, [8000 + 1600 * (5 * n % 11) for n in range(11)])
    return folder


def train(config: dict[str, Any], data: Path, exp: Path, epochs: int) -> list[float]:
    """Train to the end of an epoch with the command of the encoder; all losses so far."""
    given = [*config_options(config, data, exp), "--max_epoch", str(epochs)]
    if config["encoder"].startswith("kv_"):
        assert asr_train.main(given) == 0
    else:
        stock_asr_train.main(given)
    return update_losses(exp)


@pytest.mark.slow
@pairwise(
    name=["kv_conformer", "kv_branchformer", "kv_e_branchformer", "kv_transformer"],
    batches=BATCHES,
    decoder=["transformer", "kv_transformer"],
    # of another kernel the rounding differs, and training amplifies it
    kernel={"sdpa": (True, "float32"), "explicit": (False, "float64")},
    dropout={"dropout": 0.1, "none": 0.0},
    init={"xavier": "xavier_uniform", "default": None},
)
def test_losses_and_checkpoints_are_those_of_the_stock_encoder(
    name, batches, decoder, kernel, dropout, init, data, tmp_path
):
    sdpa, dtype = kernel
    sizes = {"output_size": 16, "attention_heads": 2, "num_blocks": 1, "use_sdpa": sdpa}
    ours = batches | {
        "encoder": name,
        "encoder_conf": sizes | SIZES[name] | dict.fromkeys(DROPOUT, dropout),
        "decoder": decoder,
        "decoder_conf": CONFIG["decoder_conf"] | {"use_sdpa": sdpa},
        "train_dtype": dtype,
        "init": init,
        "optim_conf": {"lr": 0.001},
        "scheduler": "warmuplr",
        "scheduler_conf": {"warmup_steps": EPOCH},
        "num_iters_per_epoch": EPOCH,
    }
    stock = ours | {"encoder": name.removeprefix("kv_"), "decoder": "transformer"}
    configs = {"stock": stock, "ours": ours}

    for kind, config in configs.items():
        train(config, data, tmp_path / kind, epochs=1)
        shutil.copytree(tmp_path / kind, tmp_path / f"from_{kind}")
    losses = {kind: train(configs[kind], data, tmp_path / kind, epochs=2) for kind in configs}
    losses["stock, then ours"] = train(ours, data, tmp_path / "from_stock", epochs=2)
    losses["ours, then stock"] = train(stock, data, tmp_path / "from_ours", epochs=2)

    assert len(losses["stock"]) == 2 * EPOCH
    assert sum(losses["stock"][:EPOCH]) > sum(losses["stock"][EPOCH:])
    for kind, got in losses.items():
        print(f"{kind}: {largest_difference(losses['stock'], got):.1e}")
    assert all(largest_difference(losses["stock"], got) < 1e-5 for got in losses.values())
    last = [weights(tmp_path / kind / "2epoch.pth") for kind in configs]
    assert list(last[0]) == list(last[1])
