"""On a GPU: streams equal one pass, results equal those on the CPU, models train and compile."""

import copy

import pytest
import small_models
import torch
from devices import device_or_skip
from small_decoders import OPTIONS, assert_same, search
from small_decoders import SIZE as DECODER_SIZE
from small_decoders import pair as pair_of_decoders
from small_encoders import ATTENTIONS, OURS, build
from streams import streaming, utterances
from torch import Tensor, nn

DEVICE = device_or_skip()
pytestmark = pytest.mark.gpu

# numbers of size 1 that went through two blocks, in each type
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}
attentions = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32, which convolutions use by default, is off by 1e-3."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


@torch.no_grad()
def one_pass(encoder: nn.Module, x: Tensor) -> Tensor:
    """(T, F) -> (T', D)"""
    y, lengths, _ = encoder(x[None], torch.tensor([len(x)], device=x.device))
    return y[0, : int(lengths[0])]


@torch.no_grad()
def in_pieces(encoder: nn.Module, xs: Tensor, size: int, **conf) -> Tensor:
    """(B, T, F) -> (B, T', D), heard `size` frames at a time."""
    state = encoder.init_state(len(xs), **conf)
    out = []
    for start in range(0, xs.size(1), size):
        piece = xs[:, start : start + size]
        y, state = encoder.forward_chunk(piece, state, start + size >= xs.size(1))
        out.append(y)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OURS)
@attentions
def test_a_stream_is_one_pass(name, attention, dtype):
    encoder = streaming(name, **attention).to(DEVICE, dtype)
    xs = torch.stack([utterances(40)[0], utterances(40)[0]]).to(DEVICE, dtype)
    got = in_pieces(encoder, xs, size=11)
    assert got.device.type == DEVICE.type and got.dtype == dtype
    expected = torch.stack([one_pass(encoder, x) for x in xs])
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("cache_dtype", ["fp16", "bf16", "int8", "int4"])
def test_a_cache_in_few_bits_is_as_on_the_cpu(cache_dtype):
    encoder = streaming("kv_conformer", **ATTENTIONS["mla"])
    xs = torch.stack(utterances(40))
    expected = in_pieces(encoder, xs, size=11, cache_dtype=cache_dtype)
    got = in_pieces(encoder.to(DEVICE), xs.to(DEVICE), size=11, cache_dtype=cache_dtype)
    # a number at the border of two steps may fall on the other side
    tolerance = {"fp16": 0.01, "bf16": 0.05, "int8": 0.05, "int4": 0.5}[cache_dtype]
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", OURS)
@attentions
def test_an_encoder_gives_what_it_gives_on_the_cpu(name, attention):
    encoder = build(name, **attention)
    x = utterances(40)[0]
    expected = one_pass(encoder, x)
    got = one_pass(encoder.to(DEVICE), x.to(DEVICE))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [0, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", OURS)
@attentions
def test_gradients_are_those_on_the_cpu(name, attention, chunk):
    encoder = (
        streaming(name, chunk=chunk, **attention).train() if chunk else build(name, **attention)
    )
    x = utterances(41)[0]
    expected, got = (
        gradients(encoder, x),
        gradients(copy.deepcopy(encoder).to(DEVICE), x.to(DEVICE)),
    )
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            got[parameter], gradient, rtol=1e-3, atol=1e-5 * largest, msg=parameter
        )


def gradients(encoder: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients on the CPU of a weighted sum of the output for x (T, F)."""
    y, _, _ = encoder(x[None], torch.tensor([len(x)], device=x.device))
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    (y * weights).sum().backward()
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return {name: gradient.cpu() for name, gradient in found.items()}


@pytest.mark.parametrize("conf", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
@pytest.mark.parametrize("lm", [False, True], ids=["", "lm"])
def test_a_search_finds_what_it_finds_on_the_cpu(conf, ctc_weight, lm):
    _, decoder = pair_of_decoders(**conf)
    x = torch.randn(20, DECODER_SIZE)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        beam_search = search(copy.deepcopy(decoder), 5, ctc_weight, lm).to(device)
        for scorer in [*beam_search.full_scorers.values(), *beam_search.part_scorers.values()]:
            if hasattr(scorer, "ctc"):
                scorer.ctc._ctc.to(device)  # neither the scorer nor what it holds is a module
        found.append([to_cpu(each) for each in beam_search(x.to(device), maxlenratio=0.6)])
    assert_same(*reversed(found))


def to_cpu(hypothesis):
    """A hypothesis whose tensors lie on the CPU."""

    def moved(value):
        return value.cpu() if isinstance(value, Tensor) else value

    scores = {name: moved(score) for name, score in hypothesis.scores.items()}
    return hypothesis._replace(
        yseq=moved(hypothesis.yseq), score=moved(hypothesis.score), scores=scores
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mha", "mla", "linear"])
def test_a_training_step_under_autocast(kind, dtype, tmp_path):
    if DEVICE.type == "cpu" and dtype == torch.float16:
        pytest.skip("autocast to float16 is for GPUs")
    attention = {"attention_conf": {}} | ATTENTIONS[kind]
    model, _ = small_models.build(tmp_path, encoder_conf=attention)
    model.to(DEVICE).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)  # float32 overshoots above
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64.0, enabled=dtype == torch.float16)
    speech = torch.stack([small_models.speech("AB"), small_models.speech("BA")]).to(DEVICE)
    lengths = torch.tensor([speech.size(1), speech.size(1) - 2000], device=DEVICE)
    text = torch.tensor([[2, 3], [3, 2]], device=DEVICE)
    losses = []
    for _ in range(3):
        with torch.autocast(DEVICE.type, dtype):
            loss, _, _ = model(speech, lengths, text, torch.tensor([2, 2], device=DEVICE))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["mha", "mla", "linear"])
def test_a_compiled_encoder_gives_the_same(kind):
    encoder = build("kv_conformer", **ATTENTIONS[kind]).to(DEVICE)
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend=backend)
    x = utterances(40)[0].to(DEVICE)
    got = one_pass(compiled, x)
    torch.testing.assert_close(got, one_pass(encoder, x), rtol=1e-3, atol=1e-3)
