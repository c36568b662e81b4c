"""Packed weights of linear layers."""

import copy
import pickle

import pytest
import torch
from small_encoders import assert_close, build
from torch import nn

from espnet_kv.cache.step import active_step
from espnet_kv.encoder.small_inputs import PointwiseConv1d
from espnet_kv.packed import LEAST_ROWS, PackedLinear, pack_weights

SIZE, OUT = 256, 512  # the smallest weight that is packed

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN"
)


def packed(layer):
    """What takes its place in a model."""
    model = nn.Sequential(layer)
    pack_weights(model)
    return model[0]


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(SIZE, OUT)


@pytest.fixture
def x():
    return torch.randn(2, 8, SIZE)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def uses_packed(layer, x):
    """Whether oneDNN's product runs."""
    with torch.profiler.profile() as profile:
        layer(x)
    return "mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (4,), (5,), (16,), (100,), (3, 7), (2, 3, 4), (0,)])
def test_products_are_the_same(shape, bias):
    layer = nn.Linear(SIZE, OUT, bias=bias)
    x = torch.randn(*shape, SIZE)
    wanted = layer(x)
    assert_close(packed(layer)(x), wanted)
    assert_close(layer(x), wanted)


def test_a_transposed_input_gives_the_same(linear):
    x = torch.randn(3, SIZE, 9).transpose(1, 2)
    wanted = linear(x)
    assert_close(packed(linear)(x), wanted)


def test_packing_shows_in_the_kernel_only(linear, x):
    layer = packed(packed(linear))  # the second time nothing changes
    assert uses_packed(layer, x)
    assert not uses_packed(linear, x)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert list(layer.state_dict()) == list(linear.state_dict())


def test_few_rows_are_multiplied_as_before(linear, x):
    few = x[:1, : LEAST_ROWS - 1]
    wanted = linear(few)
    assert torch.equal(packed(linear)(few), wanted)


def test_gradients_are_as_before(linear, x):
    with torch.enable_grad():
        packed(linear)(x).sum().backward()
    assert_close(linear.weight.grad, x.sum((0, 1)).expand(OUT, SIZE))


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "loaded": lambda layer: layer.load_state_dict(nn.Linear(SIZE, OUT).state_dict()),
    "assigned": lambda layer: layer.load_state_dict(nn.Linear(SIZE, OUT).state_dict(), assign=True),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(OUT, SIZE)),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(OUT, SIZE))),
    "there and back": lambda layer: (layer.double(), layer.weight.mul_(3), layer.float()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_used(linear, x, change):
    layer = packed(linear)
    layer(x)
    CHANGES[change](layer)
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert uses_packed(layer, x)


def test_a_training_step_is_noticed(linear, x):
    layer = packed(linear)
    layer(x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(x).square().sum().backward()
    optimizer.step()
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_their_own_weights(linear, x, copied):
    layer = packed(linear)
    other = copied(layer)
    wanted = layer(x)
    assert torch.equal(other(x), wanted)
    other.weight.zero_()
    assert_close(other(x), other.bias.expand(2, 8, OUT))
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_multiplied_as_before(linear, x, dtype):
    wanted = copy.deepcopy(linear).to(dtype)
    found = packed(linear).to(dtype)
    assert torch.equal(found(x.to(dtype)), wanted(x.to(dtype)))


def test_autocast_is_as_before(linear, x):
    with torch.autocast("cpu", torch.bfloat16):
        wanted = linear(x)
        found = packed(linear)(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


def test_a_traced_layer_is_an_ordinary_one(linear, x):
    layer = packed(linear)
    traced = torch.jit.trace(layer, x)
    assert "mkldnn" not in str(traced.graph)
    assert_close(traced(x), layer(x))


class Subclass(nn.Linear):
    """As those of LoRA: its forward may do something else."""


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(SIZE, OUT - 1),
        nn.Linear(SIZE, OUT, dtype=torch.float64),
        nn.Linear(SIZE, OUT, device="meta"),
        Subclass(SIZE, OUT),
        nn.Conv1d(SIZE, OUT, 1),
    ],
    ids=["small", "float64", "other device", "subclass", "convolution"],
)
def test_other_layers_stay_as_they_are(layer):
    assert packed(layer) is layer


def test_without_onednn_nothing_changes(linear, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert packed(linear) is linear


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_layer_stays_quantised(linear, x):
    small = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})
    wanted = small(x)
    pack_weights(small)
    assert torch.equal(small(x), wanted)


def test_weights_made_in_inference_mode_are_packed(x):
    with torch.inference_mode():
        layer = packed(nn.Linear(SIZE, OUT))
        assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_hooks_stay(linear, x):
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    packed(linear)(x)
    assert calls == [1]


def test_pointwise_convolutions_are_packed_for_chunks():
    torch.manual_seed(0)
    conv = PointwiseConv1d.of(nn.Conv1d(SIZE, OUT, 1))
    x = torch.randn(2, SIZE, 9)
    whole = conv(x)
    assert packed(conv) is conv
    assert torch.equal(conv(x), whole)
    with active_step(object()):
        assert uses_packed(conv, x)
        assert_close(conv(x), whole)
        conv.weight.mul_(2)
        assert_close(conv(x) - conv.bias[:, None], 2 * (whole - conv.bias[:, None]))
    copy.deepcopy(conv)


def test_a_packed_encoder_streams_the_same():
    encoder = build("kv_conformer", output_size=SIZE, linear_units=OUT, causal=True)
    x = torch.randn(1, 80, encoder.input_size)
    wanted, _ = encoder.forward_chunk(x, encoder.init_state(chunk_size=8), True)
    pack_weights(encoder)
    assert sum(isinstance(module, PackedLinear) for module in encoder.modules()) > 3
    found, _ = encoder.forward_chunk(x, encoder.init_state(chunk_size=8), True)
    assert_close(found, wanted)
    assert not torch.equal(found, wanted)  # other kernels round in another way
