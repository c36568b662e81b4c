"""Conversion to latent attention: exact cases, error bounds, statistics and metrics."""

import math
from itertools import pairwise

import pytest
import torch
from layers import HEADS, SIZE, Source, layer, outputs, permuted

from espnet_kv.cache.codec import build_codec
from espnet_kv.convert.calls import Call, recording
from espnet_kv.convert.factorize import to_mla, to_mla_by_second_moment
from espnet_kv.convert.layer_error import layer_errors, output_error
from espnet_kv.convert.linalg import hartley
from espnet_kv.convert.metric import OUTPUT_SHARE, OutputMetric
from espnet_kv.convert.statistics import LayerStatistics, gather
from espnet_kv.convert.subspace import best_rows, best_ups, common_rows
from espnet_kv.errors import ConfigError, UserError

D_K = SIZE // HEADS
KINDS = {
    "rel": {"rel_pos": True},
    "abs": {"rel_pos": False},
    "rel-chunks": {"rel_pos": True, "chunked": True},
    "abs-chunks": {"rel_pos": False, "chunked": True},
    "cross": {"rel_pos": False, "cross": True},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def prepare(rng, kind, count=12, **options):
    """A layer, statistics of the calls to fit to, and held-out calls."""
    attention = layer(kind["rel_pos"], **options)
    source = Source(rng)
    fitted, unseen = source.calls(count, **kind), source.calls(6, **kind)
    return attention, LayerStatistics.of(attention, fitted), unseen


@kinds
@pytest.mark.parametrize("rank", [SIZE, 2 * SIZE])
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "weights"])
def test_at_full_rank_the_output_is_unchanged(rng, kind, rank, calibrated):
    attention, statistics, unseen = prepare(rng, kind)
    new = to_mla(attention, rank, statistics if calibrated else None)
    torch.testing.assert_close(
        outputs(new, unseen), outputs(attention, unseen), rtol=1e-7, atol=1e-7
    )
    single, attention = new.float(), attention.float()
    torch.testing.assert_close(
        outputs(single, unseen), outputs(attention, unseen), rtol=5e-5, atol=5e-5
    )


@kinds
def test_a_key_bias_cancels_and_is_dropped(rng, kind):
    attention, _, unseen = prepare(rng, kind)
    before, converted = outputs(attention, unseen), to_mla(attention, 5)
    with torch.no_grad():
        attention.linear_k.bias.add_(3 * torch.randn(SIZE, dtype=torch.float64))
    torch.testing.assert_close(outputs(attention, unseen), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs(to_mla(attention, 5), unseen), outputs(converted, unseen))


@kinds
def test_heads_in_another_order_give_the_same(rng, kind):
    attention, statistics, unseen = prepare(rng, kind)
    other = permuted(attention, [2, 0, 3, 1])
    torch.testing.assert_close(outputs(other, unseen), outputs(attention, unseen))
    again = LayerStatistics.of(other, statistics.calls)
    new, same = to_mla(attention, 3, statistics), to_mla(other, 3, again)
    torch.testing.assert_close(outputs(same, unseen), outputs(new, unseen), rtol=1e-3, atol=1e-3)
    plain, same = to_mla(attention, 8), to_mla(other, 8)
    torch.testing.assert_close(outputs(same, unseen), outputs(plain, unseen))


@kinds
def test_error_on_held_out_inputs_falls_with_the_rank(rng, kind):
    attention, statistics, unseen = prepare(rng, kind)
    errors = [
        output_error(attention, to_mla(attention, r, statistics), unseen) for r in (2, 5, 10, 15)
    ]
    assert all(after < before for before, after in pairwise(errors)), errors


@kinds
@pytest.mark.parametrize("rank", [4, 8])
def test_error_on_held_out_inputs_is_lower_than_of_usual_methods(rng, kind, rank):
    """On average: single random layers are exceptions."""
    ratios = []
    for _ in range(4):
        attention, statistics, unseen = prepare(rng, kind, count=24)
        ours, aware, plain = (
            output_error(attention, new, unseen)
            for new in (
                to_mla(attention, rank, statistics),
                to_mla_by_second_moment(attention, rank, statistics),
                to_mla(attention, rank),
            )
        )
        ratios.append(ours / aware)
        assert max(ours, aware) < plain
    assert sum(ratios) / 4 < 0.95, ratios


def test_the_mean_error_of_values_is_in_their_bias(rng):
    attention, statistics, _ = prepare(rng, KINDS["rel"])
    new = to_mla(attention, 2, statistics)
    for head in range(HEADS):
        rows = slice(head * D_K, (head + 1) * D_K)
        mean = statistics.pooled_mean[head]
        old = attention.linear_v(mean)[rows]
        torch.testing.assert_close(new.linear_v_up(new.linear_kv_down(mean))[rows], old)


def test_the_result_is_deterministic(rng):
    attention, statistics, _ = prepare(rng, KINDS["rel"])
    first, second = to_mla(attention, 5, statistics), to_mla(attention, 5, statistics)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_other_parameters_and_settings_are_copied(rng):
    attention, statistics, _ = prepare(rng, KINDS["rel"], zero_triu=True)
    attention.state_index = 3
    new = to_mla(attention.train(), 5, statistics)
    assert (new.zero_triu, new.dropout_rate, new.state_index, new.training) == (True, 0.1, 3, True)
    new = to_mla(attention.eval().float(), 5, statistics)
    assert new.linear_q.weight.dtype == torch.float32 and not new.training
    for name in ("linear_q.weight", "linear_pos.weight", "pos_bias_u", "linear_out.bias"):
        assert torch.equal(new.get_parameter(name), attention.get_parameter(name))
        assert new.get_parameter(name) is not attention.get_parameter(name)


def test_normalised_keys_are_refused(rng):
    attention = layer(rel_pos=False, qk_norm=True)
    with pytest.raises(UserError, match="qk_norm"):
        to_mla(attention, 4)
    with pytest.raises(UserError, match="qk_norm"):
        LayerStatistics.of(attention, Source(rng).calls(1, rel_pos=False))


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="kv_rank"):
        to_mla(layer(), 2 * SIZE + 1)


def naive_weights(attention, call: Call) -> torch.Tensor:
    """(B, H, Q, S) attention weights, by the formula; relative positions, padding and chunks."""
    position, mask = call.context
    pos_emb = getattr(position, "pos_emb", position)
    batch, frames, _ = call.key.shape
    q = attention.linear_q(call.query).view(batch, frames, HEADS, D_K)
    k = attention.linear_k(call.key).view(batch, frames, HEADS, D_K)
    p = attention.linear_pos(pos_emb[0]).view(-1, HEADS, D_K)
    weights = torch.zeros(batch, HEADS, frames, frames, dtype=torch.float64)
    for b in range(batch):
        for i in range(frames):
            keys = [j for j in range(frames) if mask[b, 0, j]]
            if pos_emb is not position:
                size, left = position.size, position.left
                keys = [j for j in keys if 0 <= i // size - j // size <= left]
            for h in range(HEADS):
                logits = [
                    (q[b, i, h] + attention.pos_bias_u[h]) @ k[b, j, h]
                    + (q[b, i, h] + attention.pos_bias_v[h]) @ p[frames - 1 - i + j, h]
                    for j in keys
                ]
                if keys:
                    weights[b, h, i, keys] = torch.softmax(torch.stack(logits) / math.sqrt(D_K), 0)
    return weights


def test_a_latent_survives_four_bits(rng):
    """Its numbers are of similar size, so one scale for all of them resolves each."""
    source = Source(rng, 64)
    source.mix[:, 0] *= 8  # one direction dominates the latent, as in trained models
    attention = layer(rel_pos=False, size=64)
    calls = source.calls(6, rel_pos=False)
    statistics = LayerStatistics.of(attention, calls)
    x = torch.cat([call.key.flatten(0, 1) for call in calls])
    for convert in (to_mla, to_mla_by_second_moment):
        new = convert(attention, 24, statistics)
        latent = new.linear_kv_down(x).detach()
        aligned = latent @ hartley(24)  # as the SVD gives it
        codec = build_codec("int4", 24, torch.float64)
        deviation = (latent - latent.mean(dim=0)).norm()
        errors = [
            float((codec.decode(codec.encode(c), torch.float64) - c).norm() / deviation)
            for c in (latent, aligned)
        ]
        assert errors[0] < 0.6 * errors[1], errors


@pytest.mark.parametrize("size", [1, 2, 7, 96])
def test_the_rotation_is_orthogonal_and_spreads_a_number(size):
    rotation = hartley(size)
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, unit, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation, rotation.T, rtol=0, atol=1e-12)
    assert rotation.abs().max() <= (2 / size) ** 0.5 + 1e-12


@pytest.mark.parametrize("kind", ["rel", "rel-chunks"])
@torch.no_grad()
def test_statistics_equal_those_of_plain_loops(rng, kind):
    attention = layer()
    calls = Source(rng).calls(2, **KINDS[kind])
    for call in calls:
        call.gradient = torch.randn(call.query.shape, dtype=torch.float64, generator=rng)
    statistics = LayerStatistics.of(attention, calls)
    frames, queries, pooled, spread, gradients, by_logits = [], [], [], [], [], []
    for call in calls:
        weights = naive_weights(attention, call)
        for b, length in enumerate([call.key.size(1), call.key.size(1) // 2]):
            for i in range(length):
                frames.append(call.key[b, i])
                queries.append(attention.linear_q(call.query[b, i]).view(HEADS, D_K))
                a = weights[b, :, i, :length]  # (H, S)
                means = a @ call.key[b, :length]  # (H, D)
                pooled.append(means)
                deviation = call.key[b, None, :length] - means[:, None]  # (H, S, D)
                spread.append(torch.einsum("hs,hsd,hse->hde", a, deviation, deviation))
                g = call.gradient[b, i].view(HEADS, D_K)
                values = attention.linear_v(call.key[b, :length]).view(length, HEADS, D_K)
                output = torch.einsum("hs,shd->hd", a, values)
                by_logit = a * torch.einsum("hd,shd->hs", g, values - output)
                gradients.append(torch.einsum("hi,hj->hij", g, g))
                z = by_logit @ call.key[b, :length]
                by_logits.append(torch.einsum("hi,hj->hij", z, z))
    x, q = torch.stack(frames), torch.stack(queries) + attention.pos_bias_u
    means = torch.stack(pooled)
    assert (statistics.frames, statistics.queries) == (len(x), len(q))
    for got, expected in (
        (statistics.mean, x.mean(0)),
        (statistics.second_moment, x.T @ x / len(x)),
        (statistics.covariance, torch.cov(x.T, correction=0)),
        (statistics.query_moment, torch.einsum("nhi,nhj->hij", q, q) / len(q)),
        (statistics.pooled_mean, means.mean(0)),
        (statistics.pooled_covariance[1], torch.cov(means[:, 1].T, correction=0)),
        (statistics.spread, torch.stack(spread).mean(0)),
        (statistics.gradient_moment, torch.stack(gradients).mean(0)),
        (statistics.logit_moment, torch.stack(by_logits).mean(0)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_gather_records_the_calls_of_a_model(rng):
    attention, calls = layer(), Source(rng).calls(3)
    got = gather({"a": attention}, lambda: [call.run(attention) for call in calls])["a"]
    expected = LayerStatistics.of(attention, calls)
    torch.testing.assert_close(got.spread, expected.spread)
    assert len(got.calls) == 3 and not attention._forward_pre_hooks
    with pytest.raises(UserError, match="processed no audio"):
        gather({"a": attention}, lambda: None)


def test_a_backward_pass_adds_the_gradients_of_the_recorded_calls(rng):
    attention, (call, *_) = layer().requires_grad_(False), Source(rng).calls(1)
    noise = torch.randn(call.query.shape, dtype=torch.float64, generator=rng)
    with recording({"a": attention}) as calls:
        (call.run(attention) * noise).sum().backward()
        with torch.no_grad():
            call.run(attention)
    seen, without = calls["a"]
    torch.testing.assert_close(seen.gradient, noise @ attention.linear_out.weight)
    assert without.gradient is None and not attention.linear_out._forward_pre_hooks


@torch.no_grad()
def test_the_metric_of_values_is_the_output_error(rng):
    """E |o' - o|^2 for any error of one head's values, with unchanged keys."""
    attention, statistics, _ = prepare(rng, KINDS["rel"], count=60)
    metric = OutputMetric.of(attention, statistics)
    error = torch.randn(HEADS, D_K, SIZE, dtype=torch.float64)
    _, weighted = metric.weigh(torch.zeros_like(error), error)
    wrong = layer()
    wrong.load_state_dict(attention.state_dict())
    for head in range(HEADS):
        rows = slice(head * D_K, (head + 1) * D_K)
        wrong.load_state_dict(attention.state_dict())
        wrong.linear_v.weight[rows] += error[head]
        change = outputs(wrong, statistics.calls) - outputs(attention, statistics.calls)
        change = change - change.mean(dim=0)  # the bias compensates the mean
        expected = change.square().sum(dim=1).mean()
        # the gradients are noise: their moment is W_out' W_out only in expectation
        found = weighted[head].square().sum() / (1 + OUTPUT_SHARE)
        assert float(found) == pytest.approx(float(expected), rel=0.1)


@torch.no_grad()
def test_the_metric_of_keys_correlates_with_the_output_error(rng):
    """Estimate and true error of many random directions are strongly correlated."""
    attention, statistics, _ = prepare(rng, KINDS["rel"])
    metric = OutputMetric.of(attention, statistics)
    wrong = layer()
    predicted, true = [], []
    for trial in range(24):
        error = torch.zeros(HEADS, D_K, SIZE, dtype=torch.float64)
        error[trial % HEADS] = 1e-4 * torch.outer(torch.randn(D_K), torch.randn(SIZE)).double()
        wrong.load_state_dict(attention.state_dict())
        wrong.linear_k.weight += error.flatten(0, 1)
        predicted.append(metric.weigh(error, torch.zeros_like(error))[0].square().sum())
        change = outputs(wrong, statistics.calls) - outputs(attention, statistics.calls)
        true.append(change.square().sum(dim=1).mean())
    logs = torch.stack([torch.stack(predicted).log(), torch.stack(true).log()])
    assert torch.corrcoef(logs)[0, 1] > 0.8


def squared_error(maps, roots, rows) -> float:
    rest = (maps - best_ups(maps, roots, rows) @ rows) @ roots
    return float(rest.square().sum())


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_best_rows_for_one_norm_are_the_svd(rng, rank):
    maps = torch.randn(6, 4, SIZE, dtype=torch.float64, generator=rng)
    root = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=rng)
    root = root @ root.T / SIZE
    moments = (root @ root).expand(6, -1, -1)
    singular = torch.linalg.svdvals(maps.flatten(0, 1) @ root)
    rows = best_rows(maps, moments, rank)
    assert squared_error(maps, root, rows) == pytest.approx(float(singular[rank:].square().sum()))


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_best_rows_for_many_norms_are_a_local_minimum(rng, rank):
    maps = torch.randn(6, 4, SIZE, dtype=torch.float64, generator=rng)
    factors = torch.randn(6, SIZE, SIZE, dtype=torch.float64, generator=rng)
    roots = factors @ factors.transpose(1, 2) / SIZE
    moments = roots @ roots
    rows = best_rows(maps, moments, rank)
    best = squared_error(maps, roots, rows)
    assert best < squared_error(maps, roots, common_rows(maps, moments)[:rank])
    for size in (1e-1, 1e-2):
        for _ in range(10):
            assert squared_error(maps, roots, rows + size * torch.randn_like(rows)) > best


@kinds
def test_layer_errors(rng, kind):
    attention, statistics, unseen = prepare(rng, kind)
    none = layer_errors(attention, attention, unseen)
    assert max(none.values()) < 1e-6
    errors = layer_errors(attention, to_mla(attention, 3, statistics), unseen)
    assert all(0.001 < error < 1 for error in errors.values()), errors
    k = attention.linear_k.weight
    silent = layer(kind["rel_pos"])
    silent.load_state_dict(attention.state_dict())
    with torch.no_grad():
        silent.linear_k.weight.copy_(2 * k[torch.arange(SIZE - 1, -1, -1)])
        silent.linear_v.weight.zero_()
        mean = outputs(attention, unseen).mean(dim=0)
        silent.linear_v.bias.zero_()
        silent.linear_out.bias.copy_(mean)
    errors = layer_errors(attention, silent, unseen)
    assert errors["k"] < 1e-6  # another basis is no error
    assert errors["v"] == pytest.approx(1) and errors["output"] == pytest.approx(1)
