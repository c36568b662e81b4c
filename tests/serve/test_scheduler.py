"""Which streams the steps of the server have, and when a step waits for more."""

import asyncio
import time

import pytest
from small_models import build, speech

from espnet_kv.serve.metrics import Metrics
from espnet_kv.serve.scheduler import Scheduler
from espnet_kv.streaming.recognizer import StreamingRecognizer

WAIT = 0.8  # seconds; a step takes a few milliseconds
SOON = 0.6


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory):
    model, args = build(tmp_path_factory.mktemp("model"))
    return StreamingRecognizer(
        asr_model=model, asr_train_args=args, chunk_size=8, left_chunks=2, ctc_weight=1.0
    )


class Steps(Scheduler):
    """Notes the streams of each step, and its seconds after the start."""

    def __init__(self, recognizer, max_wait=WAIT, max_batch_size=8):
        super().__init__(recognizer, 8, max_batch_size, max_wait, Metrics(8))
        self.taken, self.began = [], time.monotonic()
        self.first, self.next = self._sizes

    async def _step(self, clients):
        now = time.monotonic() - self.began
        self.taken.append(({int(str(client)) for client in clients}, now))
        await super()._step(clients)


def steps(recognizer, scenario, seconds=WAIT + SOON, **options):
    """The steps of a scheduler while and after `scenario` runs: streams by number, and times."""

    async def run():
        scheduler = Steps(recognizer, **options)
        task = asyncio.create_task(scheduler.run())
        await scenario(scheduler)
        await asyncio.sleep(seconds)
        task.cancel()
        return scheduler.taken

    return asyncio.run(run())


def audio(samples):
    return speech("ABBAABBA").numpy()[:samples]


async def one_after_the_other(scheduler):
    a, b = (scheduler.open() for _ in range(2))
    a.accept(audio(scheduler.first))
    await asyncio.sleep(0.1)
    b.accept(audio(scheduler.first))


def test_a_single_stream_does_not_wait(recognizer):
    async def scenario(scheduler):
        scheduler.open().accept(audio(scheduler.first))

    ((streams, when),) = steps(recognizer, scenario)
    assert streams == {1}
    assert when < SOON


def test_streams_that_become_ready_in_time_share_a_step(recognizer):
    async def scenario(scheduler):
        a, b, c = (scheduler.open() for _ in range(3))
        a.accept(audio(scheduler.first))
        await asyncio.sleep(0.1)
        b.accept(audio(scheduler.first))
        c.accept(audio(scheduler.first - 1))  # not ready

    ((streams, when),) = steps(recognizer, scenario)
    assert streams == {1, 2}
    assert WAIT <= when < WAIT + SOON  # after the first of them


def test_a_step_begins_as_soon_as_nobody_else_can_join(recognizer):
    ((streams, when),) = steps(recognizer, one_after_the_other)
    assert streams == {1, 2}
    assert 0.1 <= when < 0.1 + SOON


def test_a_full_batch_does_not_wait(recognizer):
    async def scenario(scheduler):
        a, _, _ = (scheduler.open() for _ in range(3))
        a.accept(audio(scheduler.first))

    ((streams, when),) = steps(recognizer, scenario, max_batch_size=1)
    assert streams == {1}
    assert when < SOON


def test_the_end_of_a_stream_does_not_wait(recognizer):
    async def scenario(scheduler):
        a, _ = (scheduler.open() for _ in range(2))
        a.accept(audio(scheduler.first // 2))
        a.complete()

    ((streams, when),) = steps(recognizer, scenario)
    assert streams == {1}
    assert when < SOON


def test_a_stream_with_two_chunks_does_not_wait(recognizer):
    async def scenario(scheduler):
        a, _ = (scheduler.open() for _ in range(2))
        a.accept(audio(scheduler.first + 2 * scheduler.next))

    first, second, third = steps(recognizer, scenario)
    assert second[1] < SOON
    assert third[1] >= WAIT  # by then it is not late any more
    assert first[0] == second[0] == third[0] == {1}


def test_without_a_wait_every_stream_is_decoded_at_once(recognizer):
    first, second = steps(recognizer, one_after_the_other, max_wait=0)
    assert (first[0], second[0]) == ({1}, {2})


def test_a_stream_that_waits_again_waits_from_its_new_chunk_on(recognizer):
    async def scenario(scheduler):
        a, _ = (scheduler.open() for _ in range(2))
        a.accept(audio(scheduler.first))
        await asyncio.sleep(WAIT + 0.1)
        a.accept(audio(scheduler.next))

    first, second = steps(recognizer, scenario)
    assert first[1] >= WAIT
    assert second[1] - first[1] >= WAIT
