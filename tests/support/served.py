"""A server in a fork, and clients of it."""

import asyncio
import json
import os
import signal
import subprocess
import time
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from commands import Forked

from espnet_kv.bin import serve

PATIENCE = 60.0  # seconds, for anything that has to happen


class Served:
    """`espnet_kv.bin.serve` with these options and a free port; a context manager that ends it.

    url: address of the websocket. options: of the command.
    """

    def __init__(self, *options: str):
        self._command = Forked(serve.main, ["--port", "0", *options])
        line = self._command.stdout.readline()
        assert line.startswith("listening on "), self._command.finish().stderr
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        self._ended: subprocess.CompletedProcess | None = None

    @property
    def pid(self) -> int:
        return self._command.pid

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        if self._ended is None:
            self.stop()

    def stop(self, number: int = signal.SIGTERM) -> subprocess.CompletedProcess:
        """Send a signal and return the end of the command."""
        os.kill(self.pid, number)
        self._ended = self._command.finish()
        return self._ended

    def get(self, path: str, **options: Any) -> tuple[int, str]:
        """(status, text) of an address."""

        async def read() -> tuple[int, str]:
            async with (
                aiohttp.ClientSession() as session,
                session.get(self.url + path, **options) as answer,
            ):
                return answer.status, await answer.text()

        return asyncio.run(read())

    def health(self) -> dict[str, Any]:
        return json.loads(self.get("/health")[1])

    def metric(self, name: str, **options: Any) -> float:
        """The value of a metric, given with its labels; 0: it is not there."""
        _, text = self.get("/metrics", **options)
        found = [line.split()[-1] for line in text.splitlines() if line.split()[0] == name]
        return float(found[0]) if found else 0.0


class Talk(NamedTuple):
    """What a client received.

    results: JSON objects. closed: (code, reason) of the server; None: the client closed.
    """

    results: list[dict[str, Any]]
    closed: tuple[int, str] | None

    @property
    def text(self) -> str:
        return "".join(result["text"] for result in self.results if result.get("is_final"))

    @property
    def error(self) -> str:
        (error,) = (result["error"] for result in self.results if "error" in result)
        return error


async def receive(socket: aiohttp.ClientWebSocketResponse) -> Talk:
    """Receive until Done! or the server closes."""
    results: list[dict[str, Any]] = []
    while True:
        message = await socket.receive(timeout=PATIENCE)
        if message.type is aiohttp.WSMsgType.TEXT and message.data == "Done!":
            return Talk(results, None)
        if message.type is aiohttp.WSMsgType.TEXT:
            results.append(json.loads(message.data))
        elif message.type is aiohttp.WSMsgType.CLOSE:
            return Talk(results, (message.data, message.extra))
        else:
            return Talk(results, (socket.close_code or 0, f"{message.type!r} {message.data}"))


async def talk(
    url: str, *messages: Any, pause: float = 0.0, samples: int = 8000, **options: Any
) -> Talk:
    """Send messages and receive until the end: text, bytes, or audio (N,), which is split.

    Args:
        pause: seconds between pieces of audio of this many samples.
        options: for aiohttp's ws_connect.
    """
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, max_msg_size=0, **options) as socket,
    ):
        receiving = asyncio.create_task(receive(socket))
        try:
            for message in messages:
                if isinstance(message, str):
                    await socket.send_str(message)
                elif isinstance(message, bytes):
                    await socket.send_bytes(message)
                else:
                    audio = np.asarray(message, np.float32)
                    for start in range(0, len(audio), samples):
                        await socket.send_bytes(audio[start : start + samples].tobytes())
                        await asyncio.sleep(pause)
        except ConnectionError:
            pass  # the server has closed
        return await receiving


async def until(condition: Any) -> None:
    """Wait until an asynchronous condition holds."""
    end = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
