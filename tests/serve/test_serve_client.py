"""The audio and the results that wait in the server are bounded and keep their order."""

import asyncio

import numpy as np
import pytest

from espnet_kv.serve.client import MOST_RESULTS, Client
from espnet_kv.serve.server import _problem


def client(first: int = 5, size: int = 3, most: int = 10) -> Client:
    return Client(1, (first, size), most, lambda: None)


def numbers(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.float32)


def test_audio_leaves_in_pieces_whatever_the_messages_were():
    one, taken = client(), []
    for start, stop in ((0, 2), (2, 2), (2, 11), (11, 12)):
        one.accept(numbers(start, stop))
    while one.is_ready:
        taken.append(one.take().samples.tolist())
    assert [len(piece) for piece in taken] == [5, 3, 3]
    assert [sample for piece in taken for sample in piece] == list(range(11))
    one.complete()
    last = one.take()
    assert last.is_last and last.samples.tolist() == [11]


def test_what_waits_at_the_end_is_taken_in_pieces_too():
    one = client()
    one.accept(numbers(0, 9))
    one.complete()
    pieces = [one.take() for _ in range(3)]
    assert [(len(piece.samples), piece.is_last) for piece in pieces] == [
        (5, False),
        (3, False),
        (1, True),
    ]


def test_many_short_messages_need_little_memory():
    one = client(first=16000, size=16000, most=160000)
    for sample in range(15000):
        one.accept(numbers(sample, sample + 1))
        one.accept(numbers(0, 0))
    assert len(one._audio) < 12 and not one.is_ready
    one.complete()
    assert one.take().samples.tolist() == list(range(15000))


def test_a_sender_waits_while_there_is_no_room():
    async def run() -> None:
        one = client(most=10)
        one.accept(numbers(0, 9))
        await asyncio.wait_for(one.room(), 1)
        one.accept(numbers(9, 10))
        waiting = asyncio.create_task(one.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        one.take()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(run())


def test_of_partial_results_the_newest_is_kept_and_all_final_ones():
    async def run() -> list:
        one = client()
        for number in range(5):
            one.put([(f"partial {number}", True)])
        one.put([("final 0", False), ("partial 5", True)])
        one.put([("final 1", False)], is_over=True)
        return [await one.result() for _ in range(3)]

    assert asyncio.run(run()) == ["final 0", "final 1", None]


def test_a_stream_whose_results_are_not_read_is_not_decoded():
    async def run() -> None:
        one = client()
        one.accept(numbers(0, 100))
        for number in range(MOST_RESULTS):
            assert one.is_ready
            one.put([(f"final {number}", False)])
        assert not one.is_ready
        await one.result()
        assert one.is_ready

    asyncio.run(run())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0" * 6, "6 bytes are not a multiple of 4"),
        (np.array([0, np.nan], "<f4").tobytes(), "infinite or NaN"),
        (np.array([-np.inf], "<f4").tobytes(), "infinite or NaN"),
        (np.array([3, -20000], "<f4").tobytes(), "a sample is 20000: scale samples"),
    ],
)
def test_bytes_that_are_no_audio_are_explained(data, said):
    assert said in _problem(data)


@pytest.mark.parametrize("data", [b"", np.array([-1, 0.5, 1.01], "<f4").tobytes()])
def test_audio_has_no_problem(data):
    assert _problem(data) is None
