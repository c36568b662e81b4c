"""Clients that misbehave get a reason, and another client of the same server notices nothing."""

import asyncio
import json
import socket
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from served import PATIENCE, Served, Talk, receive, talk, until
from small_models import RATE, save, speech

from espnet_kv.streaming.batch import StreamingBatch

SPOKEN = "ABBA_AB"
STREAMS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> list[str]:
    return save(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def server(model):
    with Served(
        *model,
        *("--max_streams", str(STREAMS), "--max_message_bytes", "1000000"),
        *("--max_stream_seconds", "30", "--endpoint_silence_ms", "5000"),
    ) as served:
        yield served


def beside(url: str, bad):
    """The result of a coroutine, while another client is recognized as if it were alone."""

    async def both():
        good = asyncio.create_task(
            talk(url, speech(SPOKEN), "Done", samples=RATE // 10, pause=0.005)
        )
        result = await bad
        talked = await good
        assert talked.closed is None and talked.text == SPOKEN.replace("_", "")
        return result

    return asyncio.run(both())


async def open_streams(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url + "/health") as answer:
        return json.loads(await answer.text())["streams"]


AUDIO = speech("AB")
NAN = np.full(100, np.nan, np.float32).tobytes()


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        ([AUDIO, "Stop"], 1003, "the text 'Stop' was received; allowed: Done"),
        ([AUDIO, "x" * 100_000], 1003, "the text 'xxx"),
        ([AUDIO, b"123"], 1007, "3 bytes are not a multiple of 4"),
        ([AUDIO, NAN], 1007, "infinite or NaN"),
        ([AUDIO, 20000 * AUDIO], 1007, "scale samples to between -1 and 1"),
        ([speech("AB" + 100 * "_")], 1008, "longer than 30 s (--max_stream_seconds)"),
    ],
    ids=["text", "long text", "bytes", "NaN", "integers", "endless"],
)
def test_the_text_so_far_and_the_reason_come_before_the_end(server, sent, code, said):
    talked: Talk = beside(server.url, talk(server.url, *sent))
    assert talked.text == "AB"
    assert said in talked.error
    assert talked.closed is not None
    assert talked.closed[0] == code and said in talked.closed[1]


def test_a_client_that_sends_nothing_any_more_is_closed(model):
    with Served(*model, "--idle_seconds", "2") as server:
        talked: Talk = beside(server.url, talk(server.url, AUDIO))
    assert talked.text == "AB"
    assert talked.closed == (1008, "no audio came for 2 s (--idle_seconds)") == (1008, talked.error)


def test_a_message_that_is_too_long_closes_the_websocket(server):
    before = server.metric('espnet_kv_streams_ended_total{reason="bad_message"}')
    talked: Talk = beside(server.url, talk(server.url, AUDIO, b"\0" * 10_000_000))
    assert talked.closed == (1009, "a message has more than 1000000 bytes (--max_message_bytes)")
    assert server.metric('espnet_kv_streams_ended_total{reason="bad_message"}') == before + 1


def test_an_error_of_the_server_ends_the_streams_of_its_step_alone(model, monkeypatch):
    accept, bad = StreamingBatch.accept, float(np.float32(0.765))

    def failing(self, pieces, final=()):
        if any((piece == bad).any() for piece in pieces.values()):
            raise RuntimeError("a fault that no one foresaw")
        return accept(self, pieces, final)

    monkeypatch.setattr(StreamingBatch, "accept", failing)
    with Served(*model, "--max_batch_size", "1") as server:
        talked: Talk = beside(server.url, talk(server.url, AUDIO, np.full(9999, bad)))
        ended = server.stop()
    assert talked.closed == (1011, "decoding failed; see the server's log") == (1011, talked.error)
    assert "a fault that no one foresaw" in ended.stderr and ended.returncode == 0


def test_a_client_that_vanishes_frees_its_stream(server):
    async def vanish() -> None:
        async with aiohttp.ClientSession() as session:
            connected = await session.ws_connect(server.url)
            await connected.send_bytes(AUDIO.numpy().tobytes())
            await connected.receive()
            transport = connected.get_extra_info("socket")
            # the connection is reset
            transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connected._response.connection.transport.abort()

    beside(server.url, vanish())

    async def all_free() -> bool:
        return await open_streams(server.url) == 0

    asyncio.run(until(all_free))


def test_of_many_clients_at_once_the_server_takes_as_many_as_it_may(server):
    """The others get status 503 and one sentence, and may come again."""

    async def attempt(session: aiohttp.ClientSession) -> str:
        try:
            async with session.ws_connect(server.url) as connected:
                await connected.send_bytes(AUDIO.numpy().tobytes())
                await connected.send_str("Done")
                return (await receive(connected)).text
        except aiohttp.WSServerHandshakeError as error:
            return str(error.status)

    async def crowd() -> list[str]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            held = [await session.ws_connect(server.url) for _ in range(STREAMS - 2)]
            answers = await asyncio.gather(*(attempt(session) for _ in range(200)))
            for one in held:
                await one.close()
            return answers

    answers = beside(server.url, crowd())
    assert set(answers) == {"AB", "503"} and answers.count("503") > 100
    refused = server.metric('espnet_kv_streams_refused_total{reason="full"}')
    assert refused == answers.count("503")


def test_the_refusal_is_one_sentence(server):
    async def one_too_many() -> tuple[int, str]:
        async with aiohttp.ClientSession() as session:
            held = [await session.ws_connect(server.url) for _ in range(STREAMS)]
            upgrade = {
                **{"Connection": "Upgrade", "Upgrade": "websocket"},
                **{"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="},
            }
            async with session.get(server.url, headers=upgrade) as answer:
                status, text = answer.status, await answer.text()
            for one in held:
                await one.close()
            return status, text

    status, text = asyncio.run(one_too_many())
    assert status == 503
    assert json.loads(text) == {"error": "all 6 streams are in use; try again later"}


def test_ten_megabytes_at_once_do_not_delay_another_client(model):
    """Two and a half minutes of audio; with one stream in a step, the two take turns."""
    with Served(*model, "--max_batch_size", "1") as server:
        audio = np.tile(speech("AB").numpy(), 150)[: 10_000_000 // 4]

        async def delays() -> tuple[list[float], Talk]:
            big = asyncio.create_task(talk(server.url, audio.tobytes(), "Done"))
            await asyncio.sleep(0.2)
            good = await talk(server.url, speech(SPOKEN), "Done", samples=2560, pause=0.05)
            assert good.text == SPOKEN.replace("_", "") and not big.done()
            big.cancel()
            return [result["latency"] for result in good.results], good

        latencies, _ = asyncio.run(delays())
        assert sorted(latencies)[len(latencies) // 2] < 2  # seconds; the rest of the long one: 7


def memory(server: Served, kind: str) -> int:
    """kB in memory now (VmRSS), or at most so far (VmHWM)."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0])


def test_a_client_that_reads_no_results_is_closed_and_holds_little(model):
    """Its results and its audio stop in the sockets; others go on."""
    with Served(*model, "--idle_seconds", "3", "--beam_size", "1") as server:

        async def deaf() -> int:
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", server.port))
            raw.sendall(
                b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            samples = speech("ABBA" * 8).numpy().tobytes()
            frame = b"\x82\xff" + len(samples).to_bytes(8, "big") + b"\0\0\0\0" + samples
            raw.setblocking(False)
            sent, end, loop = 0, time.monotonic() + PATIENCE, asyncio.get_running_loop()
            try:
                while time.monotonic() < end:
                    await asyncio.wait_for(loop.sock_sendall(raw, frame), PATIENCE)
                    sent += len(frame)
            except ConnectionError:
                return sent
            finally:
                raw.close()
            raise AssertionError(f"{sent} bytes were taken and the connection is open")

        before = memory(server, "VmRSS")
        assert beside(server.url, deaf()) < 100_000_000
        assert server.metric('espnet_kv_streams_ended_total{reason="slow"}') == 1
        assert memory(server, "VmHWM") < before + 100_000
