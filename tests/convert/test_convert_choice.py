"""Choice between conversions of a model's attention by its error on held-out inputs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from layers import SIZE, Source, layer, outputs

from espnet_kv.convert.calibration import disturbed
from espnet_kv.convert.calls import recording
from espnet_kv.convert.choice import (
    BY_LAYER,
    EQUAL,
    EXACT,
    KEY_SCALES,
    ONE,
    USUAL,
    ModelError,
    candidates,
    choose_mla,
    replaced,
)
from espnet_kv.convert.factorize import to_mla, to_mla_by_second_moment, to_shared_mla
from espnet_kv.convert.layer_error import relative_error
from espnet_kv.convert.metric import OutputMetric
from espnet_kv.convert.source import PARTS
from espnet_kv.convert.statistics import LayerStatistics

RANK = 5


def model_of(attentions) -> SimpleNamespace:
    """A decoder whose blocks hold cross-attention."""
    blocks = [SimpleNamespace(src_attn=attention) for attention in attentions]
    return SimpleNamespace(decoder=SimpleNamespace(decoders=blocks))


@pytest.fixture
def three_layers(rng):
    part, source = PARTS["decoder_cross"], Source(rng)
    model = model_of([layer(rel_pos=False) for _ in range(3)])
    fitted = {name: source.calls(4, rel_pos=False, cross=True) for name in part.attentions(model)}
    unseen = {name: source.calls(3, rel_pos=False, cross=True) for name in fitted}
    layers = {
        name: (attention, LayerStatistics.of(attention, fitted[name]))
        for name, attention in part.attentions(model).items()
    }
    return model, layers, unseen


NAMES = (USUAL, *map(EQUAL.format, KEY_SCALES))


@pytest.mark.parametrize("wanted", [*NAMES, BY_LAYER.format(KEY_SCALES[-1])])
def test_the_candidate_with_the_smallest_error_of_the_model_is_chosen(three_layers, wanted):
    _, layers, _ = three_layers
    with torch.no_grad():  # the last layer matters most
        list(layers.values())[-1][0].linear_out.weight.mul_(3)
    layers = {n: (a, LayerStatistics.of(a, known.calls)) for n, (a, known) in layers.items()}
    names = iter([*NAMES, BY_LAYER.format(KEY_SCALES[-1])])
    errors = {name: 3.0 - n / 10 for n, name in enumerate(NAMES)} | {wanted: 0.0}

    def model_error(modules) -> float:
        return errors.get(next(names), 3.0)

    choice = choose_mla(layers, RANK, 3 * RANK, model_error)
    assert choice.chosen == wanted
    assert choice.errors[wanted] == 0 and len(choice.errors) == candidates(3 * RANK)
    ranks = [module.kv_rank for module in choice.modules.values()]
    if wanted not in NAMES:
        assert sum(ranks) == 3 * RANK and ranks[-1] == max(ranks) > RANK
    else:
        assert ranks == [RANK] * 3
    for name, (attention, known) in layers.items():
        usual = to_mla_by_second_moment(attention, RANK, known).linear_kv_down.weight
        assert torch.equal(choice.modules[name].linear_kv_down.weight, usual) == (wanted == USUAL)


def test_it_is_never_worse_than_equal_ranks_with_the_second_moment(three_layers):
    model, layers, unseen = three_layers
    part = PARTS["decoder_cross"]

    def run() -> torch.Tensor:
        parts = [outputs(a, unseen[name]) for name, a in part.attentions(model).items()]
        return torch.cat(parts, dim=1).log_softmax(dim=-1)

    error = ModelError(model, part, run)
    choice = choose_mla(layers, RANK, 3 * RANK, error.of)
    assert error.of(choice.modules) == choice.errors[choice.chosen] <= choice.errors[USUAL]
    usual = {n: to_mla_by_second_moment(a, RANK, known) for n, (a, known) in layers.items()}
    assert error.of(usual) == pytest.approx(choice.errors[USUAL])


@pytest.fixture
def one_input(rng):
    """Three layers of cross-attention, whose queries differ and whose frames are the same."""
    part, source = PARTS["decoder_cross"], Source(rng)
    model = model_of([layer(rel_pos=False) for _ in range(3)])
    first, held_out = (source.calls(n, rel_pos=False, cross=True) for n in (6, 4))

    def calls(frames):
        others = source.calls(len(frames), rel_pos=False, cross=True)
        return [
            replace(own, key=call.key, context=call.context)
            for own, call in zip(others, frames, strict=True)
        ]

    names = list(part.attentions(model))
    fitted, unseen = ({name: calls(c) for name in names} for c in (first, held_out))
    layers = {
        name: (attention, LayerStatistics.of(attention, fitted[name]))
        for name, attention in part.attentions(model).items()
    }
    return model, layers, unseen


@pytest.mark.parametrize("rank", [SIZE, SIZE + 4])
def test_one_latent_of_the_model_size_loses_nothing(one_input, rank):
    _, layers, unseen = one_input
    modules = to_shared_mla([attention for attention, _ in layers.values()], rank)
    assert len({id(module.linear_kv_down) for module in modules}) == 1
    for (name, (attention, _)), module in zip(layers.items(), modules, strict=True):
        torch.testing.assert_close(outputs(module, unseen[name]), outputs(attention, unseen[name]))


def test_one_latent_is_better_than_one_of_each_layer_with_as_many_numbers(one_input):
    """Each layer reads all the numbers, so none has fewer than it had alone."""
    _, layers, unseen = one_input
    metrics = {name: OutputMetric.of(*known) for name, known in layers.items()}
    attentions = [attention for attention, _ in layers.values()]
    known = [(statistics, metrics[name]) for name, (_, statistics) in layers.items()]
    one = dict(zip(layers, to_shared_mla(attentions, 3 * RANK, known), strict=True))
    for name, (attention, statistics) in layers.items():
        expected = outputs(attention, unseen[name])
        each = to_mla(attention, RANK, statistics, metrics[name])
        errors = [relative_error(outputs(m, unseen[name]), expected) for m in (one[name], each)]
        assert errors[0] < 0.8 * errors[1], name


def test_cross_attention_gets_one_latent_for_a_budget(one_input):
    model, layers, unseen = one_input
    part, asked = PARTS["decoder_cross"], []

    def run() -> torch.Tensor:
        parts = [outputs(a, unseen[name]) for name, a in part.attentions(model).items()]
        return torch.cat(parts, dim=1).log_softmax(dim=-1)

    error = ModelError(model, part, run)
    steps = []
    choice = choose_mla(layers, RANK, 3 * RANK, error.of, lambda: steps.append(1), 3 * RANK)
    assert list(choice.errors) == [USUAL, *map(ONE.format, KEY_SCALES)]
    assert choice.errors[choice.chosen] < choice.errors[USUAL]
    assert len(set(choice.errors.values())) == len(choice.errors)
    assert {module.kv_rank for module in choice.modules.values()} == {3 * RANK}
    assert all(module.shares_state for module in choice.modules.values())
    assert len(steps) == len(layers) * candidates(3 * RANK, 3 * RANK, SIZE)

    def record(modules) -> float:
        asked.append(modules)
        return error.of(modules)

    steps.clear()
    choice = choose_mla(layers, SIZE, 9 * SIZE, record, lambda: steps.append(1), SIZE)
    assert choice.chosen == EXACT and len(asked) == 1
    assert choice.errors[EXACT] < 1e-6
    assert len(steps) == len(layers) * candidates(9 * SIZE, SIZE, SIZE)


def test_the_error_of_a_decoder_is_the_divergence_of_its_distributions():
    """Log-probabilities of improbable tokens hardly count, however much they change."""
    part, model = PARTS["decoder_cross"], model_of([torch.zeros(1000)])
    (name,) = part.attentions(model)
    logits, rare, probable = torch.zeros(3, 1, 1000)
    logits[:, 0] = 12
    rare[:, 1:] = torch.randn(1, 999)
    probable[:, 0] = -9

    def run() -> torch.Tensor:
        return (logits + model.decoder.decoders[0].src_attn).log_softmax(dim=-1)

    error = ModelError(model, part, run)
    assert error.of({}) == 0
    assert error.of({name: rare}) < error.of({name: probable}) / 5
    p, q = logits.softmax(-1), (logits + probable).softmax(-1)
    expected = float((p * (p / q).log()).sum())
    assert error.of({name: probable}) == pytest.approx(expected, rel=1e-4)


def test_errors_that_the_model_does_not_see_are_left(rng):
    """A model reads one direction of a layer's output; the conversion spends its rank on it."""
    found = []
    for _ in range(8):  # single random layers are exceptions
        attention, source = layer(rel_pos=False), Source(rng)
        with torch.no_grad():  # nearly uniform attention: errors of values decide
            attention.linear_k.weight.mul_(0.01)
        read = torch.randn(SIZE, 1, dtype=torch.float64, generator=rng)
        fitted, unseen = source.calls(12, rel_pos=False), source.calls(6, rel_pos=False)
        blind = LayerStatistics.of(attention, fitted)
        with recording({"a": attention}) as seen, torch.enable_grad():
            for call in fitted:
                output = call.run(attention) @ read
                (output * torch.randn(output.shape, generator=rng)).sum().backward()
        sighted = LayerStatistics.of(attention, seen["a"])
        expected = outputs(attention, unseen) @ read
        found.append(
            [
                relative_error(outputs(to_mla(attention, 2, known), unseen) @ read, expected)
                for known in (sighted, blind)
            ]
        )
    ratios = [a / b for a, b in found]
    assert sum(ratios) / len(ratios) < 0.75, ratios


def test_replaced_modules_come_back_after_an_error():
    model, part = model_of(["first"]), PARTS["decoder_cross"]
    (name,) = part.attentions(model)
    with pytest.raises(ZeroDivisionError), replaced(model, part, {name: "other"}):
        assert model.decoder.decoders[0].src_attn == "other"
        raise ZeroDivisionError
    assert model.decoder.decoders[0].src_attn == "first"


def test_disturbed_inputs_keep_the_start_and_change_a_share_of_the_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens, others = torch.arange(2000), torch.full((5,), 7000)
    copy = disturbed(tokens, others, generator)
    assert copy[0] == tokens[0]
    kept = torch.isin(tokens, copy).sum()
    replacements, doubled = (copy == 7000).sum(), (copy[1:] == copy[:-1]).sum()
    assert 0.75 * 2000 < kept < 0.85 * 2000  # a tenth is replaced, a tenth dropped
    assert 150 < replacements < 250 and 150 < doubled < 250
    again = disturbed(tokens, others, torch.Generator().manual_seed(0))
    assert torch.equal(again, copy)
    assert torch.equal(disturbed(tokens[:1], others, generator), tokens[:1])
