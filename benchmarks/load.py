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
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import psutil
import soundfile
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
    add("--program", type=Path, help="sherpa-onnx-online-websocket-client, instead of our client")
    add("--core", type=int, default=0, help="that the server runs on")
    add("server", nargs="+", help="command of the server, after --")
    return parser


class Result(NamedTuple):
    """A message of the server. at: when it came. start: of its segment, seconds in the audio."""

    at: float
    segment: int
    tokens: list[str]
    timestamps: list[float]
    start: float

    @classmethod
    def of(cls, message: str) -> "Result":
        """Of JSON that came now."""
        result = json.loads(message)
        if "error" in result:
            raise UserError(f"the server: {result['error']}")
        start = result.get("start_time", 0.0)
        return cls(
            time.monotonic(), result["segment"], result["tokens"], result["timestamps"], start
        )


class Spoken(NamedTuple):
    """A recording that was sent: its text, the latencies of its tokens and of the last result."""

    text: str
    tokens: list[float]
    end: float

    @classmethod
    def of(cls, results: Sequence[Result], began: float, ended: float) -> "Spoken":
        """From all results, and the times of the first and the last sample."""
        segments = {result.segment: result for result in results}
        latencies = []
        for segment, last in segments.items():
            entries = [result for result in results if result.segment == segment]
            for count in range(1, len(last.tokens) + 1):
                first = next(r.at for r in entries if r.tokens[:count] == last.tokens[:count])
                latencies.append(first - began - last.start - last.timestamps[count - 1])
        text = " ".join("".join(result.tokens) for result in segments.values() if result.tokens)
        at = max((result.at for result in results), default=ended)
        return cls(text.replace("\u2581", " ").strip(), latencies, at - ended)


async def speak(
    session: aiohttp.ClientSession, url: str, samples: np.ndarray, paced: bool
) -> Spoken:
    """Send a recording.

    Args:
        paced: send in real time.
    """
    size = round(PIECE * RATE)
    results: list[Result] = []
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
            results.append(Result.of(message.data))
        return Spoken.of(results, began, await sending)


async def run_program(program: Path, port: int, wav: Path, seconds: float) -> Spoken:
    """Send a recording in real time with sherpa-onnx's own client, which writes to stderr.

    The milliseconds in which the process starts count as latency.
    """
    began = time.monotonic() - PIECE  # it sends the first piece at once
    process = await asyncio.create_subprocess_exec(
        *(program, f"--server-port={port}", f"--samples-per-message={round(PIECE * RATE)}"),
        *(f"--seconds-per-message={PIECE}", wav),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    results, line = [], ""
    assert process.stderr is not None
    async for raw in process.stderr:
        line = raw.decode()
        if "{" in line:
            results.append(Result.of(line[line.index("{") :]))
    if await process.wait() or not line.rstrip().endswith("Done!"):
        raise UserError(f"{program} failed: {line.rstrip()}")
    return Spoken.of(results, began, began + seconds)


Send = Callable[[str], Awaitable[Spoken]]


async def client(
    number: int, send: Send, seconds: Mapping[str, float], alone: Mapping[str, str], until: float
) -> Figures:
    """Send recordings until the time is over.

    Args:
        number: of the client. send: sends the recording of a name. seconds: lengths of the
            recordings. alone: their texts without load.
    """
    figures, names = Figures(), list(seconds)
    order = itertools.cycle(names[number % len(names) :] + names[: number % len(names)])
    await asyncio.sleep(number * 0.37 % 5.0)  # they do not begin together
    while time.monotonic() < until:
        name = next(order)
        spoken = await send(name)
        figures.audio += seconds[name]
        figures.texts += 1
        figures.token += spoken.tokens
        figures.end.append(spoken.end)
        if spoken.text != alone[name]:
            figures.wrong.append((alone[name], spoken.text))
    return figures


async def run(
    args: argparse.Namespace, recordings: dict[str, np.ndarray], server: psutil.Process
) -> tuple[Figures, float]:
    """All clients; return their figures and the CPU seconds of the server."""
    url = f"ws://127.0.0.1:{args.port}/"
    connector = aiohttp.TCPConnector(limit=0)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{n}.wav") for n, name in enumerate(recordings)}
        for name, file in files.items():
            soundfile.write(file, recordings[name], RATE)
        # as all clients send them, in 16 bits
        audio = {name: soundfile.read(file, dtype="float32")[0] for name, file in files.items()}
        seconds = {name: len(samples) / RATE for name, samples in audio.items()}
        async with aiohttp.ClientSession(connector=connector) as session:
            alone = {
                name: (await speak(session, url, samples, paced=False)).text
                for name, samples in audio.items()
            }

            def send(name: str) -> Awaitable[Spoken]:
                if args.program:
                    return run_program(args.program, args.port, files[name], seconds[name])
                return speak(session, url, audio[name], paced=True)

            return await _load(args, send, seconds, alone, server)


async def _load(
    args: argparse.Namespace,
    send: Send,
    seconds: Mapping[str, float],
    alone: Mapping[str, str],
    server: psutil.Process,
) -> tuple[Figures, float]:
    """Run all clients at once, and sample the memory of the server."""
    until = time.monotonic() + 60 * args.minutes
    before = cpu_seconds(server)
    tasks = [
        asyncio.create_task(client(number, send, seconds, alone, until))
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
