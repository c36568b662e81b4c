"""Benchmarks whose figures the docs cite run, and their figures have the order they must have."""

import argparse
import importlib
import json
from pathlib import Path

import torch
from commands import run
from small_models import save, write_scp

REPO = Path(__file__).parents[2]


def test_fewer_bits_in_the_cache_mean_fewer_bytes_and_larger_errors(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    main = importlib.import_module("cache_dtype").main
    experiment = tmp_path / "asr_tones"
    experiment.mkdir()
    trained = {"chunk_size": 0, "left_chunks": -1, "dynamic_chunk_training": True}
    save(experiment, encoder_conf=trained)
    scp = write_scp(tmp_path, ["AB", "BA"])
    ended = run(
        main,
        *(str(experiment), "--wav_scp", str(scp), "--model", "model.pth"),
        *("--chunk_size", "4", "--left_chunks", "2"),
    )
    assert ended.returncode == 0, ended.stderr
    (row,) = json.loads(ended.stdout.splitlines()[-1])["results"].values()
    for key, falls in (("bytes", True), ("error", False)):
        order = [row[name][key] for name in ("fp32", "bf16", "int8", "int4")]
        assert order == sorted(set(order), reverse=falls), order
    assert row["fp32"]["error"] == 0


def test_a_fine_tuning_takes_what_an_earlier_one_made_with_the_same_options(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    kept = importlib.import_module("whisper_finetuning").kept
    made = []

    def make(value: int) -> dict[str, torch.Tensor]:
        made.append(value)
        return {"value": torch.tensor(value)}

    def found(work: Path | None, cut: float, value: int) -> int:
        args = argparse.Namespace(work=work, cut=cut, lr=value)
        return int(kept(args, "converted_0", ["cut"], make, value)["value"])

    assert [found(tmp_path, 0.5, 1), found(tmp_path, 0.5, 2), found(tmp_path, 0.75, 3)] == [1, 1, 3]
    assert found(None, 0.75, 4) == 4
    assert made == [1, 3, 4]
