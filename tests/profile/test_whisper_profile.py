"""Profiles of Whisper models: decoder caches beside arithmetic, the window, and the report."""

import csv
import json

import numpy as np
import pytest
import soundfile
import yaml
from commands import assert_one_line, run
from profile_json import make_profile, write_profile
from small_whisper import ATTENTIONS, DIMS, of

from espnet_kv.bin.profile import main
from espnet_kv.bin.report import main as report
from espnet_kv.profile.schema import read_profile

RATE = 16000


def config(attention: str = "mha", **decoder) -> dict:
    whisper = {"whisper_model": "", "dims": DIMS}
    kind, conf = ATTENTIONS[attention]
    return {
        "encoder": "kv_whisper",
        "encoder_conf": whisper | {"attention_type": kind, "attention_conf": conf},
        "decoder": "kv_whisper",
        "decoder_conf": whisper | decoder,
        "model_conf": {"ctc_weight": 0.0},
        "frontend": None,
        "input_size": 1,
    }


@pytest.fixture(scope="module")
def scp(tmp_path_factory):
    """An utterance of 2 s, one of 1 s, and one that is longer than the window."""
    folder = tmp_path_factory.mktemp("audio")
    lines = []
    for name, seconds in (("a", 2.0), ("b", 1.0), ("c", 30.5)):
        noise = 0.1 * np.random.default_rng(0).standard_normal(int(RATE * seconds))
        soundfile.write(folder / f"{name}.wav", noise, RATE)
        lines.append(f"{name} {folder}/{name}.wav\n")
    (folder / "wav.scp").write_text("".join(lines))
    return folder / "wav.scp"


def profile(folder, scp, given: dict, *more: str):
    (folder / "whisper.yaml").write_text(yaml.safe_dump(given))
    (folder / "search.yaml").write_text("beam_size: 3\nctc_weight: 0.0\n")
    return run(
        main,
        *("--config", str(folder / "whisper.yaml"), "--vocab_size", "31", "--wav_scp", str(scp)),
        *("--inference_config", str(folder / "search.yaml"), "--repeats", "1", "--ngpu", "0"),
        *("--output", str(folder / "profile.json"), *more),
    )


@pytest.fixture(scope="module", params=[("mha", "mha"), ("mla", "gqa"), ("linear", "mla")])
def profiled(request, tmp_path_factory, scp):
    """Self- and cross-attention, and the folder of the profile."""
    own, cross = request.param
    folder = tmp_path_factory.mktemp(own)
    ended = profile(folder, scp, config(own, **of(own, cross)), "--lengths", "1 40")
    assert ended.returncode == 0, ended.stderr
    assert "lengths of 40 s are left out: Whisper encodes at most 30 s" in ended.stdout
    assert "c of 30.50 s is left out" in ended.stdout
    return own, cross, folder


def test_decoder_caches_are_what_arithmetic_says(profiled):
    own, cross, folder = profiled
    found = read_profile(folder / "profile.json")
    cache = found.decoder_cache
    assert cache is not None and cache.bytes == cache.analytic
    sizes = {"mha": 2 * 32, "gqa": 2 * 2 * 8, "mla": 5, "linear": 0}
    assert cache.frames == 100  # 2 s of 20 ms
    assert cache.bytes.decoder_cross == 2 * 100 * sizes[cross] * 4
    assert cache.bytes_per_frame == 2 * sizes[cross] * 4
    assert own == "linear" or cache.bytes_per_token == 2 * sizes[own] * 4
    assert (found.model.encoder, found.model.decoder) == ("whisper", "whisper")
    assert found.cache == {} and found.time.streaming_rtf is None
    assert [length.seconds for length in found.memory.lengths] == [1]
    assert all(
        length.offline_bytes and not length.streaming_bytes for length in found.memory.lengths
    )
    assert found.time.utterance_ms is not None and found.settings.utterances == 2


@pytest.mark.parametrize("profiled", [("mla", "gqa")], indirect=True)
def test_the_report_shows_them(profiled, tmp_path):
    *_, folder = profiled
    cache = read_profile(folder / "profile.json").decoder_cache
    others = write_profile(tmp_path / "other.json", make_profile())
    files = (str(folder / "profile.json"), str(others))
    ended = run(report, *files, "--output", str(tmp_path / "report"))
    assert ended.returncode == 0, ended.stderr
    with (tmp_path / "report/comparison.csv").open() as file:
        shown = {row["decoder_cross_bytes"] for row in csv.DictReader(file)}
    assert shown == {str(cache.bytes.decoder_cross), "160000"}
    assert "whisper" in (tmp_path / "report/report.html").read_text()


def test_lengths_beyond_the_window_alone_are_refused(tmp_path, scp):
    ended = profile(tmp_path, scp, config(), "--lengths", "31 60")
    assert_one_line(ended, "--lengths: 31 60 s: Whisper encodes at most 30 s")
    assert not (tmp_path / "profile.json").exists()


def test_recordings_beyond_the_window_alone_are_refused(tmp_path, scp):
    only = tmp_path / "wav.scp"
    only.write_text("".join(line for line in scp.open() if line.startswith("c ")))
    ended = profile(tmp_path, only, config(), "--lengths", "1")
    assert_one_line(ended, "none of the 1 utterances that were chosen has from 0.3 s to 30 s")


def test_the_json_says_which_attention_is_where(tmp_path, scp):
    ended = profile(tmp_path, scp, config("gqa", **of("mla", "linear")), "--lengths", "1")
    assert ended.returncode == 0, ended.stderr
    model = json.loads((tmp_path / "profile.json").read_text())["model"]
    labels = [model[f"{place}attention_label"] for place in ("", "self_", "src_")]
    assert labels[:2] == ["gqa G2", "mla r5"] and labels[2].startswith("linear")


def test_a_latent_of_all_layers_counts_once(tmp_path, scp):
    given = config("mla", **of("mla", "mla"))
    given["decoder_conf"]["src_attention_conf"] = {"kv_rank": 32, "shared_latent": True}
    ended = profile(tmp_path, scp, given, "--lengths", "1")
    assert ended.returncode == 0, ended.stderr
    found = read_profile(tmp_path / "profile.json")
    cache = found.decoder_cache
    assert cache is not None and cache.bytes == cache.analytic
    assert cache.bytes.decoder_cross == cache.allocated.decoder_cross == 100 * 32 * 4
    assert found.model.src_attention_conf == {"kv_rank": 32, "shared_latent": True}
    assert found.model.src_attention_label == "mla r32 of all layers"
