"""Many clients that speak in real time to a websocket server, ours or sherpa-onnx's.

    python benchmarks/load.py --wav_scp dump/raw/test_clean/wav.scp --clients 40 --minutes 10 -- \
        python -m espnet_kv.bin.serve --asr_train_config ... --port 6006 --max_streams 40

The server runs on one core. Each recording is first recognized alone; then every client sends
recordings, one after the other, in pieces of 0.1 s as they would come from a microphone. The texts
have to be those of the recordings alone.
"""

import argparse
import asyncio
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from common import positive

from espnet_kv.cli import command
from espnet_kv.errors import UserError
from espnet_kv.streaming.recordings import read_scp, read_utterance

RATE = 16000
PIECE = 0.1  # seconds
SILENCE = 1.0  # seconds after a recording, because sherpa-onnx decodes whole chunks only
START_SECONDS = 300


@dataclass
class Figures:
    """What is measured while all clients speak.

    Attributes:
        audio: seconds sent. token: seconds from the beginning of a token in the audio to the first
            result that contains it and all before it as in the last result.
        end: seconds from the end of the audio to the last result.
        wrong: texts that differ from those of the recordings alone. texts: number of texts.
        resident: bytes of the server, sampled every 10 seconds.
    """

    audio: float = 0.0
    token: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    texts: int = 0
    resident: list[int] = field(default_factory=list)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Load a websocket server with clients in real time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--wav_scp", type=Path, required=True, help="recordings at 16 kHz")
    add("--utterances", type=positive, default=40, help="the first ones of the wav.scp")
    add("--clients", type=positive, default=40)
    add("--minutes", type=float, default=10.0)
    add("--port", type=positive, default=6006, help="of the server")
    add("--core", type=int, default=0, help="that the server runs on")
    add("server", nargs="+", help="command of the server, after --")
    return parser


async def speak(
    session: aiohttp.ClientSession, url: str, samples: np.ndarray, paced: bool
) -> tuple[str, list[float], float]:
    """Send a recording; return the text, the latencies of its tokens, and that of the end.

    Args:
        paced: send in real time.
    """
    size = round(PIECE * RATE)
    seen: list[tuple[float, int, list[str], list[float], float]] = []
    async with session.ws_connect(url, max_msg_size=0) as websocket:
        began = time.monotonic()

        async def send() -> float:
            for number, first in enumerate(range(0, len(samples), size)):
                if paced:
                    wait = began + (number + 1) * PIECE - time.monotonic()
                    await asyncio.sleep(max(0.0, wait))
                await websocket.send_bytes(samples[first : first + size].tobytes())
            await websocket.send_str("Done")
            return time.monotonic()

        sending = asyncio.create_task(send())
        async for message in websocket:
            if message.type is not aiohttp.WSMsgType.TEXT or message.data == "Done!":
                break
            result = json.loads(message.data)
            if "error" in result:
                raise UserError(f"{url}: {result['error']}")
            seen.append(
                (
                    time.monotonic(),
                    result["segment"],
                    result["tokens"],
                    result["timestamps"],
                    result.get("start_time", 0.0),
                )
            )
        ended = await sending
    segments = {segment: entry for entry in seen for segment in [entry[1]]}
    latencies = []
    for segment, (_, _, tokens, times, start) in segments.items():
        entries = [entry for entry in seen if entry[1] == segment]
        for count in range(1, len(tokens) + 1):
            first = next(at for at, _, found, *_ in entries if found[:count] == tokens[:count])
            latencies.append(first - began - start - times[count - 1])
    text = " ".join("".join(entry[2]) for entry in segments.values() if entry[2])
    last = max((at for at, *_ in seen), default=ended)
    return text.replace("\u2581", " ").strip(), latencies, last - ended


async def client(
    number: int, url: str, recordings: dict[str, np.ndarray], alone: dict[str, str], until: float
) -> Iterator[Any]:
    """Send recordings until the time is over; return the figures of this client."""
    figures, names = Figures(), list(recordings)
    order = itertools.cycle(names[number % len(names) :] + names[: number % len(names)])
    async with aiohttp.ClientSession() as session:
        await asyncio.sleep(number * 0.37 % 5.0)  # they do not begin together
        while time.monotonic() < until:
            name = next(order)
            text, token, end = await speak(session, url, recordings[name], paced=True)
            figures.audio += len(recordings[name]) / RATE
            figures.texts += 1
            figures.token += token
            figures.end.append(end)
            if text != alone[name]:
                figures.wrong.append((alone[name], text))
    return figures


async def run(
    args: argparse.Namespace, recordings: dict[str, np.ndarray], server: psutil.Process
) -> tuple[Figures, float]:
    """All clients; return their figures and the CPU seconds of the server."""
    url = f"ws://127.0.0.1:{args.port}/"
    alone = {}
    async with aiohttp.ClientSession() as session:
        for name, samples in recordings.items():
            alone[name], _, _ = await speak(session, url, samples, paced=False)
    until = time.monotonic() + 60 * args.minutes
    before = cpu_seconds(server)
    tasks = [
        asyncio.create_task(client(number, url, recordings, alone, until))
        for number in range(args.clients)
    ]
    found = Figures()
    while not all(task.done() for task in tasks):
        found.resident.append(server.memory_info().rss)
        await asyncio.wait(tasks, timeout=10.0, return_when=asyncio.ALL_COMPLETED)
    spent = cpu_seconds(server) - before
    for task in tasks:
        one = task.result()
        found.audio += one.audio
        found.texts += one.texts
        for name in ("token", "end", "wrong"):
            getattr(found, name).extend(getattr(one, name))
    return found, spent


def kind_of(entry: str) -> str:
    """The type of an entry of a wav.scp."""
    return "kaldi_ark" if ".ark:" in entry else "sound"


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def wait_until_open(port: int, server: subprocess.Popen) -> None:
    """Wait until the server accepts connections.

    Raises:
        UserError: it ended.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise UserError(f"no server listens at port {port} (--port); its output is above")


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {name: round(cuts[at - 1], 3) for name, at in (("p50", 50), ("p95", 95), ("p99", 99))}


@command
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    entries = dict(itertools.islice(read_scp(args.wav_scp).items(), args.utterances))
    silence = np.zeros(round(SILENCE * RATE), np.float32)
    recordings = {
        name: np.concatenate([read_utterance(entry, kind_of(entry), RATE), silence]).astype("<f4")
        for name, entry in entries.items()
    }
    server = subprocess.Popen(args.server)
    try:
        process = psutil.Process(server.pid)
        process.cpu_affinity([args.core])
        wait_until_open(args.port, server)
        figures, spent = asyncio.run(run(args, recordings, process))
    finally:
        server.terminate()
        server.wait()
    half = len(figures.resident) // 2
    row = {
        "clients": args.clients,
        "texts": figures.texts,
        "texts that differ": len(figures.wrong),
        "audio seconds": round(figures.audio, 1),
        "CPU seconds per audio second": round(spent / figures.audio, 4),
        "token latency": percentiles(figures.token),
        "end latency": percentiles(figures.end),
        "resident MiB, first half": round(max(figures.resident[:half] or [0]) / 2**20),
        "resident MiB, second half": round(max(figures.resident[half:]) / 2**20),
    }
    for name, value in row.items():
        print(f"{name}: {value}")
    for alone, text in figures.wrong[:5]:
        print(f"alone: {alone}\nunder load: {text}")
    print(json.dumps({"benchmark": "load", "command": args.server, "results": row}))


if __name__ == "__main__":
    sys.exit(main())
