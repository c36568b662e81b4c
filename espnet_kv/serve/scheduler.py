"""Steps of decoding: which streams take part, and the thread that owns the batch of streams."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from espnet_kv.serve.client import Client, Piece, message
from espnet_kv.serve.metrics import Metrics
from espnet_kv.streaming.batch import StreamingBatch
from espnet_kv.streaming.recognizer import StreamingRecognizer

QUEUE_SECONDS = 10
"""Audio of a client that may wait for decoding before the client is not read any further."""


class Scheduler:
    """Decodes the streams of clients in steps, each with at most one chunk of a stream.

    A stream takes part in a step when the samples of a whole chunk are there, or its end. Of more
    than `max_batch_size` such streams, those that have waited for the most steps take part. While
    a step runs in the thread of the decoder, the event loop collects what arrives for the next.

    A step of few streams costs more for each than one of many, so a step waits a little for other
    streams to become ready.

    Args:
        recognizer: its model and settings are used.
        max_streams: rows of the encoder's state, allocated at once.
        max_batch_size: streams in a step.
        max_wait: seconds that a stream that is ready may wait for others.
        metrics: what is measured is written there.
    """

    def __init__(
        self,
        recognizer: StreamingRecognizer,
        max_streams: int,
        max_batch_size: int,
        max_wait: float,
        metrics: Metrics,
    ):
        self.clients: list[Client] = []
        self._recognizer, self._metrics = recognizer, metrics
        self._batch = StreamingBatch(recognizer, slots=max_streams)
        self._max_batch_size, self._max_wait = max_batch_size, max_wait
        self._sizes = _piece_sizes(recognizer)
        self._steps, self._numbers = 0, itertools.count(1)
        self._wake = asyncio.Event()
        self._decoder = ThreadPoolExecutor(1, "decoder")

    def open(self) -> Client:
        """A client with a new stream."""
        most_waiting = QUEUE_SECONDS * self._recognizer.sample_rate
        client = Client(next(self._numbers), self._sizes, most_waiting, self._wake.set)
        self.clients.append(client)
        return client

    def close(self, client: Client) -> None:
        """Discard a client, and its stream if it is still open."""
        self.clients.remove(client)
        self._decoder.submit(self._drop, client)  # after the step that runs

    async def run(self) -> None:
        """Decode until this task is cancelled."""
        while True:
            self._wake.clear()
            ready = [client for client in self.clients if client.is_ready]
            ready.sort(key=lambda client: client.served)
            if not ready:
                await self._wake.wait()
            elif (delay := self._delay(ready)) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), delay)
            else:
                await self._step(ready[: self._max_batch_size])

    async def cache(self) -> tuple[dict[str, int], int]:
        """Bytes held for all streams by kind, and bytes allocated for the encoder's state."""
        return await self._in_decoder(
            lambda: (self._batch.nbytes_by_kind(), self._batch.capacity_bytes)
        )

    def _delay(self, ready: Sequence[Client]) -> float:
        """Seconds until a step of streams that are ready, unless others become ready before.

        There is no delay if no others can, or a stream is late.
        """
        most = min(self._max_batch_size, len(self.clients))
        if len(ready) >= most or any(client.is_late for client in ready):
            return 0.0
        return (
            min(client.ready_since or 0.0 for client in ready) + self._max_wait - time.monotonic()
        )

    async def _step(self, clients: list[Client]) -> None:
        self._steps += 1
        pieces = {client: client.take() for client in clients}
        for client in clients:
            client.served = self._steps
        try:
            results = await self._in_decoder(lambda: self._decode(pieces))
        except Exception:
            logging.exception("a step failed; its streams are closed")
            for client in clients:
                client.fail()
            return
        for client, texts in results.items():
            client.put(texts, is_over=pieces[client].is_last)

    async def _in_decoder[T](self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoder, work)

    def _decode(self, pieces: Mapping[Client, Piece]) -> dict[Client, list[tuple[str, bool]]]:
        """Advance streams by a piece each; return the results to be sent, see `Client.put`."""
        began = time.monotonic()
        last = {client for client, piece in pieces.items() if piece.is_last}
        # a client that never sent audio has no stream
        known: dict[Hashable, np.ndarray | Tensor] = {
            client: piece.samples
            for client, piece in pieces.items()
            if len(piece.samples) or client in self._batch.streams
        }
        ended = self._batch.accept(known, last & known.keys())
        results = {}
        for client, piece in pieces.items():
            latency = time.monotonic() - piece.arrived
            found = [best for best, *_ in ended.get(client, [])]
            if client in last and not found:  # the last result says that the stream ended
                end = client.samples / self._recognizer.sample_rate
                found = [self._recognizer.decoder.results.build([], [], 0.0, {}, (end, end))]
            texts = []
            for number, result in enumerate(found, start=1):
                is_eof = client in last and number == len(found)
                texts.append((message(result, client.segments, latency, True, is_eof), False))
                client.segments += 1
            if client not in last:
                partial = self._batch.partial(client)
                texts.append((message(partial, client.segments, latency), True))
            results[client] = texts
            self._metrics.latency.observe(latency)
        samples = sum(len(piece.samples) for piece in pieces.values())
        self._metrics.step(
            len(pieces), samples / self._recognizer.sample_rate, time.monotonic() - began
        )
        return results

    def _drop(self, client: Client) -> None:
        if client in self._batch.streams:
            self._batch.drop(client)


def _piece_sizes(recognizer: StreamingRecognizer) -> tuple[int, int]:
    """Samples that complete the first chunk of a stream, and every other chunk."""
    frontend = recognizer.frontend
    shift, window = recognizer.asr_model.encoder.chunk_features(recognizer.chunk_size)
    first = (window - 1) * frontend.hop_length + frontend.n_fft - frontend.borders[0]
    return first, shift * frontend.hop_length
