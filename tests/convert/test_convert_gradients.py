"""Gradients of the model's output at the calls of its attention modules."""

import pytest
import torch
from small_sources import Experiment, load

from espnet_kv.convert.calibration import CalibrationRunner
from espnet_kv.convert.calls import recording
from espnet_kv.convert.source import PARTS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    source = Experiment(
        tmp_path_factory.mktemp("kv") / "asr_kv", "kv_conformer", decoder="kv_transformer"
    )
    return load(source.folder)


@pytest.fixture(scope="module")
def audio() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(samples, generator=generator) for samples in (9000, 12000)]


def recorded(model, audio, parts, **options):
    attentions = {name: a for part in parts for name, a in PARTS[part].attentions(model).items()}
    runner = CalibrationRunner(model, decoding=True)
    runner.transcribe(audio, lambda: None)
    with recording(attentions) as calls:
        runner.backward(audio, **options)
    return calls


def test_every_call_gets_the_gradients_of_its_heads(model, audio):
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    calls = recorded(model, audio, PARTS)
    again = recorded(model, audio, PARTS)
    for name, of_module in calls.items():
        for call, same in zip(of_module, again[name], strict=True):
            assert call.gradient.shape == call.query.shape and call.gradient.any()
            assert torch.equal(call.gradient, same.gradient)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())


def test_the_encoder_gets_none_from_the_decoder(model, audio):
    alone = recorded(model, audio, ["encoder"], modules=["encoder"])
    with_decoder = recorded(model, audio, ["encoder"])
    for name, of_module in alone.items():
        for call, same in zip(of_module, with_decoder[name], strict=True):
            assert torch.equal(call.gradient, same.gradient)


def test_their_mean_square_predicts_the_divergence(model, audio):
    """E (g . d)^2 / 2 over many draws is the divergence that a small change d of o causes."""
    part = PARTS["decoder_cross"]
    (name, attention), *_ = part.attentions(model).items()
    runner = CalibrationRunner(model, decoding=True)
    runner.transcribe(audio, lambda: None)
    before = runner.run(audio)["decoder"]
    heads = attention.h * attention.d_k
    change = 0.02 * torch.randn(heads, generator=torch.Generator().manual_seed(0))
    squares, tokens = [], 0
    for seed in range(60):
        runner._seed = seed
        with recording({name: attention}) as calls:
            runner.backward(audio)
        of_inputs = [(call.gradient @ change).sum() for call in calls[name]]
        squares.append(sum(value**2 for value in of_inputs))
        tokens = sum(call.query.size(1) for call in calls[name])
    predicted = float(sum(squares)) / len(squares) / tokens / 2
    hook = attention.linear_out.register_forward_pre_hook(lambda _, args: (args[0] + change,))
    after = runner.run(audio)["decoder"]
    hook.remove()
    divergence = float((before.exp() * (before - after)).sum(dim=1).double().mean())
    assert predicted == pytest.approx(divergence, rel=0.3)
