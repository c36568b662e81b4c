"""Conversion to linear attention, and its training on the outputs of softmax attention."""

import pytest
import torch
from layers import SIZE, Source, layer, outputs

from espnet_kv.convert.layer_error import layer_errors, output_error
from espnet_kv.convert.transfer import to_linear, transfer
from espnet_kv.errors import ConfigError, UserError

KINDS = {
    "rel": {"rel_pos": True},
    "abs-chunks": {"rel_pos": False, "chunked": True},
    "cross": {"rel_pos": False, "cross": True},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def train_student(teacher, calls, steps: int = 40, **options):
    """A student after `steps` batches, and the reported errors."""
    student, reported = to_linear(teacher), []
    batches = iter(calls * steps)
    transfer(
        {"layer": teacher},
        {"layer": student},
        lambda: next(batches).run(teacher),
        steps,
        progress=lambda step, error: reported.append((step, error)),
        **options,
    )
    return student, reported


@kinds
def test_transfer_brings_held_out_outputs_closer(rng, kind):
    teacher, source = layer(kind["rel_pos"]), Source(rng)
    fitted, unseen = source.calls(8, **kind), source.calls(4, **kind)
    before = output_error(teacher, to_linear(teacher), unseen)
    student, reported = train_student(teacher, fitted)
    assert [step for step, _ in reported] == list(range(1, 41))
    assert reported[-1][1] < reported[0][1]
    after = output_error(teacher, student, unseen)
    assert after < before
    _, further = train_student(teacher, fitted, projections=True)
    assert further[-1][1] < reported[-1][1]


def test_only_the_selected_parameters_are_trained(rng):
    teacher, calls = layer(), Source(rng).calls(2)
    frozen = {name: p.clone() for name, p in teacher.named_parameters()}
    start = dict(to_linear(teacher).named_parameters())
    for projections, trained in (
        (False, ("feature_map",)),
        (True, ("feature_map", "linear_q", "linear_k")),
    ):
        student, _ = train_student(teacher, calls, 3, projections=projections)
        for name, parameter in student.named_parameters():
            changed = not torch.equal(parameter, start[name])
            # the key bias is trained too: it adds a constant to keys, but not to their features
            assert changed == name.startswith(trained), name
            assert parameter.grad is None or name.startswith(trained)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, frozen[name]) and parameter.grad is None


def test_the_same_batches_give_the_same_students(rng):
    teacher, calls = layer(), Source(rng).calls(3)
    first, second = train_student(teacher, calls, 5)[0], train_student(teacher, calls, 5)[0]
    assert torch.equal(outputs(first, calls), outputs(second, calls))


def test_layers_are_trained_independently(rng):
    teachers = {"a": layer(), "b": layer()}
    calls = Source(rng).calls(3)
    students = {name: to_linear(teacher) for name, teacher in teachers.items()}
    batches = iter(calls)

    def run():
        call = next(batches)
        for teacher in teachers.values():
            call.run(teacher)

    errors = transfer(teachers, students, run, 3)
    for name, teacher in teachers.items():
        alone, reported = train_student(teacher, calls, 3)
        assert torch.equal(outputs(students[name], calls), outputs(alone, calls))
        assert errors[name] == pytest.approx(reported[-1][1])


@pytest.mark.parametrize("feature_map", ["elu", "relu", "hedgehog"])
def test_projections_equal_those_of_the_source(rng, feature_map):
    teacher, calls = layer(), Source(rng).calls(2)
    student = to_linear(teacher, feature_map, decay=0.9)
    assert student.decay == 0.9
    errors = layer_errors(teacher, student, calls)
    assert errors["k"] < 1e-6 and errors["v"] < 1e-6
    q, k = student.linear_q(calls[0].key), student.linear_k(calls[0].key)
    teacher_q, teacher_k = teacher.linear_q(calls[0].key), teacher.linear_k(calls[0].key)
    size = (SIZE // 4) ** -0.5
    torch.testing.assert_close(q @ k.transpose(1, 2), size * teacher_q @ teacher_k.transpose(1, 2))


def test_impossible_conversions_are_refused():
    with pytest.raises(ConfigError, match="feature_map"):
        to_linear(layer(), "cubic")
    with pytest.raises(UserError, match="qk_norm"):
        to_linear(layer(rel_pos=False, qk_norm=True))
    with pytest.raises(UserError, match="zero_triu"):
        to_linear(layer(zero_triu=True))
