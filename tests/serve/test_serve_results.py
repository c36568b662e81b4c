"""Results of the server: those of the recognizer alone, in the protocol of sherpa-onnx."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import soundfile
import torch
from exports import LETTERS as GRAPH_LETTERS
from served import PATIENCE, Served, talk
from small_models import RATE, save, speech, write_scp

from espnet_kv.bin import export
from espnet_kv.streaming.recognizer import StreamingRecognizer

LETTERS = ("ABBA", "AB___BA", "B", "BBAB__A", "_", "AAAB_B")
OPTIONS = {
    "endpoint_silence_ms": 600.0,
    "max_segment_seconds": 30.0,
    "ctc_weight": 0.7,
    "cache_dtype": "bf16",  # the server's own default
}
ENGINES = ("torch", "onnx")
PROGRAM = shutil.which("sherpa-onnx-online-websocket-client", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with Served(
        *("--asr_train_config", str(folder / "config.yaml")),
        *("--asr_model_file", str(folder / "model.pth")),
        *("--endpoint_silence_ms", "600", "--max_batch_size", "4"),
    ) as served:
        yield served


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, folder, server):
    """A server with each engine."""
    if request.param == "torch":
        yield server
        return
    pytest.importorskip("onnxruntime", reason="the extra [serve] is not installed")
    model = ["--asr_train_config", str(folder / "config.yaml")]
    model += ["--asr_model_file", str(folder / "model.pth")]
    check = ["--check_scp", str(write_scp(folder, GRAPH_LETTERS))]
    assert export.main([*model, *check, "--output_dir", str(folder / "onnx")]) == 0
    with Served(*model, "--endpoint_silence_ms", "600", "--engine", "onnx") as served:
        yield served


@pytest.fixture(scope="module")
def alone(folder):
    """The segments of a recording in a recognizer alone."""
    recognizer = StreamingRecognizer(folder / "config.yaml", folder / "model.pth", **OPTIONS)

    def recognize(audio: torch.Tensor) -> list:
        return [best for best, *_ in recognizer.accept(audio, is_final=True)]

    return recognize


def test_many_clients_at_once_get_the_results_of_a_recognizer_alone(engine, alone):
    audios = [speech(letters) for letters in LETTERS]

    async def together():
        pieces = (777, 1600, 2560, 8000, 20000, 100000)
        sent = zip(audios, pieces, strict=True)
        return await asyncio.gather(
            *(talk(engine.url, audio, "Done", samples=n, pause=0.001) for audio, n in sent)
        )

    for audio, (results, closed) in zip(audios, asyncio.run(together()), strict=True):
        expected, finals = alone(audio), [r for r in results if r["is_final"] and r["text"]]
        assert closed is None
        assert [r["text"] for r in finals] == [segment.text for segment in expected]
        for number, (result, segment) in enumerate(zip(finals, expected, strict=True)):
            twin = segment.as_dict()
            assert result["segment"] == number and result["tokens"] == segment.token
            assert (result["start_time"], result["end_time"]) == (twin["start"], twin["end"])
            times = [result["start_time"] + time for time in result["timestamps"]]
            assert times == pytest.approx([token["start"] for token in twin["tokens"]], abs=2e-3)
            for word, other in zip(result["words"], twin["words"], strict=True):
                assert word == other | {"confidence": pytest.approx(other["confidence"], abs=2e-3)}
        assert [r["is_eof"] for r in results] == [False] * (len(results) - 1) + [True]
        assert results[-1]["is_final"]
        assert all(0 <= r["latency"] < PATIENCE for r in results)


def test_words_come_before_the_end_and_one_chunk_in_each_step(server, folder):
    audio = speech("ABBA").numpy()

    async def half_way():
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(server.url) as socket,
        ):
            await socket.send_bytes(audio[: len(audio) // 2].tobytes())
            while not (result := await socket.receive_json(timeout=PATIENCE))["text"]:
                ends.append(result["end_time"])
            return result

    ends: list[float] = []
    result = asyncio.run(half_way())
    assert result["text"] == "A" and not result["is_final"] and result["segment"] == 0
    # chunks of 4 frames of 40 ms, from the first step on
    assert [*ends, result["end_time"]] == pytest.approx([0.16 * n for n in range(1, len(ends) + 2)])


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\0" * 50], ids=["nothing", "3 ms"])
def test_a_stream_without_speech_ends_with_an_empty_result(server, sent):
    ((result,), closed) = asyncio.run(talk(server.url, sent, "Done"))
    assert closed is None
    assert result["text"] == "" and result["tokens"] == result["words"] == []
    assert result["is_final"] and result["is_eof"] and result["segment"] == 0


@pytest.mark.skipif(PROGRAM is None, reason="sherpa-onnx-bin is not installed")
def test_the_client_of_sherpa_onnx_works_unchanged(server, alone, tmp_path):
    audio = speech("AB___BA")
    soundfile.write(tmp_path / "speech.wav", audio.numpy(), RATE)
    audio = torch.from_numpy(soundfile.read(tmp_path / "speech.wav", dtype="float32")[0])
    assert PROGRAM is not None
    options = (f"--server-port={server.port}", "--seconds-per-message=0.01")
    ended = subprocess.run(
        [PROGRAM, *options, str(tmp_path / "speech.wav")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0 and ended.stderr.rstrip().endswith("Done!"), ended.stderr
    shown = [line[line.index("{") :] for line in ended.stderr.splitlines() if "{" in line]
    finals = [r for r in map(json.loads, shown) if r["is_final"]]
    assert [r["text"] for r in finals] == [segment.text for segment in alone(audio)] == ["AB", "BA"]
    assert finals[-1]["is_eof"]


def test_health_and_metrics(server):
    before = server.metric("espnet_kv_audio_seconds_total")
    audio = speech("AB")
    asyncio.run(talk(server.url, audio, "Done"))
    health = server.health()
    assert health["status"] == "ok" and health["max_streams"] == 32 and health["streams"] == 0
    assert health["model"]["sample_rate"] == RATE and not health["token"]
    assert health["cache_bytes"] <= health["cache_capacity_bytes"]
    decoded = server.metric("espnet_kv_audio_seconds_total") - before
    assert decoded == pytest.approx(len(audio) / RATE)
    steps = server.metric("espnet_kv_step_seconds_count")
    assert steps == server.metric('espnet_kv_step_seconds_bucket{le="+Inf"}') > 0
    spent = server.metric("espnet_kv_processing_seconds_total")
    assert spent == pytest.approx(server.metric("espnet_kv_step_seconds_sum"))
    assert server.metric("espnet_kv_latency_seconds_count") >= steps
    accepted = server.metric("espnet_kv_streams_accepted_total")
    ended = 'espnet_kv_streams_ended_total{reason="%s"}'
    assert accepted == sum(server.metric(ended % reason) for reason in ("done", "gone"))
    assert server.metric("espnet_kv_streams") == 0
    held = server.metric('espnet_kv_cache_bytes{kind="attention"}')
    assert held == 0 < server.metric("espnet_kv_cache_capacity_bytes")


def test_bytes_of_open_streams_are_measured(server):
    audio = np.zeros(RATE, np.float32)

    async def while_open():
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(server.url) as socket,
        ):
            await socket.send_bytes(audio.tobytes())
            while (await socket.receive_json(timeout=PATIENCE))["end_time"] < 0.7:
                pass
            text = await (await session.get(server.url + "/metrics")).text()
            return text.splitlines()

    lines = asyncio.run(while_open())
    assert "espnet_kv_streams 1.0" in lines
    # 2 layers, rank 8, left_chunks * chunk_size frames of 2 bytes
    assert f'espnet_kv_cache_bytes{{kind="attention"}} {2 * 8 * 2 * 4 * 2:.1f}' in lines
