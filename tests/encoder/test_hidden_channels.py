"""Weights, autocast and threads: nothing that an encoder kept aside may outlive its use."""

import threading

import pytest
import torch
from small_encoders import FEATURES, assert_close, batch, build, encode
from streams import STREAMED, Feeder, streaming, utterances

from espnet_kv.attention.chunks import Chunks


def _fused_adam(encoder: torch.nn.Module) -> None:
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01, fused=True)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def _copied(encoder: torch.nn.Module) -> None:
    for parameter in encoder.parameters():
        parameter.data.copy_(parameter.data + 0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("change", [_fused_adam, _copied], ids=["fused", "data.copy_"])
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_a_stream_after_a_training_step_has_the_new_weights(change, attention):
    """train, stream, train, stream in one process."""
    encoder = streaming("kv_conformer", **STREAMED[attention])
    running = []
    for _ in range(3):
        running.append(Feeder(encoder, utterances(20)))
        running[-1].run(size=20).check()
        change(encoder)


def test_streams_share_position_tables_as_long_as_the_weights_are_the_same():
    encoder = streaming("kv_conformer")
    feeders = [Feeder(encoder, utterances(20)) for _ in range(3)]
    for feeder in feeders[:2]:
        feeder.feed([40])
    _fused_adam(encoder)
    feeders[2].run(size=40).check()
    first, second, third = (feeder.state.tables for feeder in feeders)
    assert first is second
    assert first is not third


def test_a_stream_in_single_precision_after_one_under_autocast():
    encoder = streaming("kv_conformer")
    (x,) = utterances(20)
    expected = encode(encoder, x)
    with torch.autocast("cpu", torch.bfloat16):
        half = Feeder(encoder, [x]).run(size=20)
    assert_close(torch.cat(half.out[0]).float(), expected, 0.2)
    single = Feeder(encoder, [x]).run(size=20)
    assert_close(torch.cat(single.out[0]), expected)


def test_a_stream_that_leaves_autocast_goes_on():
    encoder = streaming("kv_conformer")
    feeder = Feeder(encoder, utterances(20))
    with torch.autocast("cpu", torch.bfloat16):
        feeder.feed([40])
    feeder.feed([40])
    assert all(pieces.isfinite().all() for pieces in feeder.out[0])


def _chunks_of_blocks(encoder: torch.nn.Module) -> dict[int, list[tuple[int, int]]]:
    """Per thread, in the order of its passes: the chunk masks that its attention modules got."""
    seen: dict[int, list] = {}

    def keep(module, args):
        chunks = args[3] if len(args) == 5 else None
        size = (chunks.size, chunks.left) if isinstance(chunks, Chunks) else (0, -1)
        seen.setdefault(threading.get_ident(), []).append(size)

    for block in encoder.encoders:
        block.self_attn.register_forward_pre_hook(keep)
    return seen


@pytest.mark.parametrize("name", ["kv_transformer", "kv_conformer"])
def test_passes_of_two_training_threads_keep_their_chunk_masks(name):
    encoder = build(name, dynamic_chunk_training=True, num_blocks=4).train()
    seen = _chunks_of_blocks(encoder)
    x, lengths = batch(95, 61)
    barrier = threading.Barrier(2)

    def train() -> None:
        barrier.wait()
        for _ in range(30):
            encoder(x, lengths)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for masks in seen.values():
        passes = [masks[n : n + 4] for n in range(0, len(masks), 4)]
        assert len(passes) == 30
        assert all(len(set(blocks)) == 1 for blocks in passes)
        assert len({blocks[0] for blocks in passes}) > 2


def test_replicas_of_a_training_encoder_keep_their_chunk_masks():
    """As nn.DataParallel calls them: copies that share the hooks, from threads of their own."""
    encoder = build("kv_transformer", dynamic_chunk_training=True, num_blocks=4).train()
    seen = _chunks_of_blocks(encoder)
    replicas = [encoder._replicate_for_data_parallel() for _ in range(2)]
    x, lengths = batch(95, 61)
    threads = [
        threading.Thread(target=lambda r=r: [r(x, lengths) for _ in range(20)]) for r in replicas
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for masks in seen.values():
        assert all(len(set(masks[n : n + 4])) == 1 for n in range(0, len(masks), 4))
        assert len(set(masks)) > 2


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Calls that make the CPU wait for a device, and copies from one to the other."""

    WAITING = ("_local_scalar_dense", "nonzero", "_to_copy", "item", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.inside, self.calls = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.inside and name in self.WAITING:
            self.calls.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("attention", STREAMED, ids=str)
def test_no_layer_waits_for_the_device(attention, monkeypatch):
    """Streams of different ages: lists stay on the CPU, index tensors are made once per chunk."""
    encoder = streaming("kv_conformer", 4, 2, **STREAMED[attention])
    feeder = Feeder(encoder, utterances(40, 30, 20), empty=1e4)
    feeder.feed([31, 60, 11])
    counter = Counter()
    made = []
    for name in ("tensor", "arange", "as_tensor"):
        own = getattr(torch, name)

        def watched(*args, own=own, name=name, **kwargs):
            if counter.inside:
                made.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(torch, name, watched)
    own_tolist = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor,
        "tolist",
        lambda t: (
            (counter.calls.append("tolist"), own_tolist(t))[1] if counter.inside else own_tolist(t)
        ),
    )

    def enter(*_):
        counter.inside = True

    def leave(*_):
        counter.inside = False

    modules = list(encoder._stateful_modules())
    for module in modules:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    with counter:
        feeder.feed([40, 13, 40])
    assert counter.calls == []
    # the sums of linear attention make the powers of their decay
    assert made == [] or attention == "decay"
    monkeypatch.undo()
    feeder.run(17).check()


def test_keys_are_not_moved_and_positions_not_copied_before_the_ring_wraps(monkeypatch):
    encoder = streaming("kv_conformer", 4, -1)
    state = encoder.init_state()
    copies = []
    own = torch.cat
    monkeypatch.setattr(torch, "cat", lambda xs, *a, **k: copies.append(xs) or own(xs, *a, **k))
    for _ in range(10):
        _, state = encoder.forward_chunk(torch.randn(1, 16, FEATURES), state)
    of_bias = [xs for xs in copies if xs[0].dim() == 4]
    assert of_bias == []
