"""Benchmarks whose figures the docs cite run, and their figures have the order they must have."""

import importlib
import json
from pathlib import Path

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
