"""The server: HTTP and websocket on one port, limits, endings of streams, shutdown."""

import asyncio
import json
import signal
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web

from espnet_kv.serve.access import Access, json_body
from espnet_kv.serve.client import Client
from espnet_kv.serve.metrics import Metrics
from espnet_kv.serve.scheduler import Scheduler
from espnet_kv.streaming.recognizer import StreamingRecognizer

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/recorder.js": ("recorder.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOUDEST = 8.0
"""Absolute value of a sample; a resampled recording exceeds 1 slightly, 16-bit integers do much."""
CLOSE_SECONDS = 2.0
"""Time that a client has for its part of closing a websocket."""
SHUTDOWN_SECONDS = 10.0
"""Time to decode, at the end of the server, the audio that arrived before."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        max_streams: open streams. max_batch_size: streams decoded together.
        max_wait: seconds that a chunk may wait for those of other streams.
        idle_seconds: time without audio, or without reading results, after which a stream ends.
        max_stream_seconds: audio of a stream, and time that it is open; 0: no limit.
        max_message_bytes: bytes of one message.
    """

    max_streams: int
    max_batch_size: int
    max_wait: float
    idle_seconds: float
    max_stream_seconds: float
    max_message_bytes: int


class Ending(NamedTuple):
    """Why a stream ended.

    Attributes:
        reason: label in the metrics.
        code: close code of the websocket.
        problem: the reason in words for the client.
    """

    reason: str
    code: int = WSCloseCode.OK
    problem: str = ""


DONE = Ending("done")
GONE = Ending("gone")  # the client closed the connection, or it broke
SLOW = Ending("slow")  # the client does not read its results
SHUTDOWN = Ending("shutdown", WSCloseCode.GOING_AWAY, "the server is shutting down")
FAILED = Ending("error", WSCloseCode.INTERNAL_ERROR, "decoding failed; see the server's log")


class Server:
    """Recognizes the streams of many clients, with the websocket protocol of sherpa-onnx.

    Args:
        recognizer: model and settings of all streams.
        limits: bounds.
        access: who may use it.
        name: of the model, for /health.
    """

    def __init__(self, recognizer: StreamingRecognizer, limits: Limits, access: Access, name: str):
        self._limits, self._access = limits, access
        self._model = {
            "name": name,
            "sample_rate": recognizer.sample_rate,
            "chunk_seconds": round(recognizer.chunk_size * recognizer.frame_seconds, 3),
            "left_chunks": recognizer.left_chunks,
        }
        self._rate = recognizer.sample_rate
        self._metrics = Metrics(limits.max_streams)
        self._scheduler = Scheduler(
            recognizer, limits.max_streams, limits.max_batch_size, limits.max_wait, self._metrics
        )
        folder = resources.files("espnet_kv.serve")
        self._page = {path: (folder / name).read_text("utf-8") for path, (name, _) in PAGE.items()}

    async def run(
        self, listener: socket.socket, tls: ssl.SSLContext | None, ready: Callable[[], None]
    ) -> None:
        """Serve until SIGTERM or SIGINT; then end the open streams with the text they have.

        Args:
            listener: a socket that listens.
            tls: None: without TLS.
            ready: called when clients are served.
        """
        loop = asyncio.get_running_loop()
        self._stopping: asyncio.Future[None] = loop.create_future()
        self._overdue: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._measured)
        for path in PAGE:
            app.router.add_get(path, self._file if path != "/" else self._root)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_SECONDS)
        await runner.setup()
        site = web.SockSite(runner, listener, ssl_context=tls)
        await site.start()
        decoding = asyncio.create_task(self._scheduler.run())
        ready()
        await _any_of(self._stopping, decoding)
        if decoding.done():
            decoding.result()  # it ends by an exception only
        await site.stop()
        loop.call_later(SHUTDOWN_SECONDS, self._overdue.set_result, None)
        while self._scheduler.clients and not self._overdue.done():
            await asyncio.sleep(0.05)
        await runner.cleanup()
        decoding.cancel()

    def _stop(self) -> None:
        """End the server; a second signal kills it."""
        self._stopping.set_result(None)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    async def _health(self, request: web.Request) -> web.Response:
        held, capacity = await self._scheduler.cache()
        return web.json_response(
            {
                "status": "ok",
                "streams": len(self._scheduler.clients),
                "max_streams": self._limits.max_streams,
                "model": self._model,
                "cache_bytes": sum(held.values()),
                "cache_capacity_bytes": capacity,
                "token": self._access.token is not None,
            }
        )

    async def _measured(self, request: web.Request) -> web.Response:
        self._access.check_token(request)
        text = self._metrics.text(len(self._scheduler.clients), *await self._scheduler.cache())
        return web.Response(
            body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _root(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._stream(request)
        return await self._file(request)

    async def _file(self, request: web.Request) -> web.Response:
        _, kind = PAGE[request.path]
        text = self._page[request.path]
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """A websocket from its request to its end."""
        try:
            self._access.check_origin(request)
            self._access.check_token(request)
        except web.HTTPException as refusal:
            reason = "origin" if isinstance(refusal, web.HTTPForbidden) else "token"
            self._metrics.refused.labels(reason).inc()
            raise
        if len(self._scheduler.clients) >= self._limits.max_streams:
            self._metrics.refused.labels("full").inc()
            problem = f"all {self._limits.max_streams} streams are in use; try again later"
            raise web.HTTPServiceUnavailable(**json_body(problem), headers={"Retry-After": "5"})
        websocket = _Websocket(
            timeout=CLOSE_SECONDS, compress=False, max_msg_size=self._limits.max_message_bytes
        )
        client, ending, transport = self._scheduler.open(), GONE, request.transport
        try:
            await websocket.prepare(request)
            self._metrics.accepted.inc()
            ending = await self._converse(websocket, client)
        finally:
            self._scheduler.close(client)
            if websocket.prepared:
                self._metrics.ended.labels(ending.reason).inc()
        if ending not in (GONE, SLOW):
            await self._close(websocket, ending)
        if transport is not None and websocket.close_code != ending.code:
            transport.abort()  # what it did not read would be kept until it does
        return websocket

    async def _converse(self, websocket: web.WebSocketResponse, client: Client) -> Ending:
        """Receive audio and send results until all results are sent."""
        reading = asyncio.create_task(self._read(websocket, client))
        sending = asyncio.create_task(self._send(websocket, client))
        try:
            await _any_of(reading, sending, self._stopping)
            ending = SHUTDOWN
            if reading.done():
                ending = reading.result()
            reading.cancel()
            await asyncio.wait({reading})
            if ending is not GONE and not websocket.closed:
                client.complete()
                await _any_of(sending, self._overdue)
                ending = (sending.result() if sending.done() else None) or ending
            return ending
        finally:
            reading.cancel()
            sending.cancel()

    async def _read(self, websocket: web.WebSocketResponse, client: Client) -> Ending:
        """Receive audio until the stream ends."""
        opened, limit = asyncio.get_running_loop().time(), self._limits.max_stream_seconds
        idle = self._limits.idle_seconds
        while True:
            try:
                received = await websocket.receive(timeout=idle)
            except TimeoutError:
                problem = f"no audio came for {idle:g} s (--idle_seconds)"
                return Ending("idle", WSCloseCode.POLICY_VIOLATION, problem)
            if received.type is WSMsgType.TEXT and received.data.strip() == "Done":
                return DONE
            if received.type is WSMsgType.TEXT:
                problem = f"the text {received.data[:20]!r} was received; allowed: Done"
                return Ending("bad_text", WSCloseCode.UNSUPPORTED_DATA, problem)
            if received.type is WSMsgType.ERROR:
                return Ending("bad_message", websocket.close_code or WSCloseCode.PROTOCOL_ERROR)
            if received.type is not WSMsgType.BINARY:
                return GONE
            if bad := _problem(received.data):
                return Ending("bad_audio", WSCloseCode.INVALID_TEXT, bad)
            client.accept(np.frombuffer(received.data, "<f4").astype(np.float32, copy=False))
            open_seconds = asyncio.get_running_loop().time() - opened
            if limit and max(client.samples / self._rate, open_seconds) > limit:
                problem = f"the stream is longer than {limit:g} s (--max_stream_seconds)"
                return Ending("too_long", WSCloseCode.POLICY_VIOLATION, problem)
            await client.room()

    async def _send(self, websocket: web.WebSocketResponse, client: Client) -> Ending | None:
        """Send results; return why that ended, None: all were sent."""
        try:
            while (text := await client.result()) is not None:
                async with asyncio.timeout(self._limits.idle_seconds):
                    await websocket.send_str(text)
        except TimeoutError:
            return SLOW
        except ConnectionError:
            return GONE
        return FAILED if client.failed else None

    async def _close(self, websocket: web.WebSocketResponse, ending: Ending) -> None:
        """Tell a client why its stream ended, and close the websocket."""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(CLOSE_SECONDS):
                if ending is DONE:
                    await websocket.send_str("Done!")
                    await websocket.receive()  # clients close then
                elif ending.problem:
                    await websocket.send_str(json.dumps({"error": ending.problem}))
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(2 * CLOSE_SECONDS):
                await websocket.close(code=ending.code, message=ending.problem.encode())


class _Websocket(web.WebSocketResponse):
    """A websocket that gives a reason when aiohttp closes it because of a bad message."""

    def __init__(self, *, max_msg_size: int, **options: Any):
        super().__init__(max_msg_size=max_msg_size, **options)
        self._reasons: dict[int, str] = {
            WSCloseCode.MESSAGE_TOO_BIG: f"a message has more than {max_msg_size} bytes "
            "(--max_message_bytes)",
            WSCloseCode.PROTOCOL_ERROR: "this is not the websocket protocol",
            WSCloseCode.INVALID_TEXT: "a text is not UTF-8",
        }

    async def close(
        self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True
    ) -> bool:
        """Close with a reason."""
        reason = message or self._reasons.get(code, "").encode()
        return await super().close(code=code, message=reason, drain=drain)


async def _any_of(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of these is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _problem(data: bytes) -> str | None:
    """Why bytes are no audio."""
    if len(data) % 4:
        return f"{len(data)} bytes are not a multiple of 4: send samples as 32-bit floats"
    samples = np.frombuffer(data, "<f4")
    if not np.isfinite(samples).all():
        return "the audio holds samples that are infinite or NaN"
    loudest = np.abs(samples).max(initial=0.0)
    if loudest > LOUDEST:
        return f"a sample is {loudest:g}: scale samples to between -1 and 1"
    return None
