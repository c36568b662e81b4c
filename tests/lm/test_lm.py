"""The language model kv_transformer token by token: its scores, its bytes, its options."""

import argparse

import pytest
import torch
from espnet2.lm.transformer_lm import TransformerLM
from espnet2.tasks.lm import LMTask, lm_choices
from espnet2.utils.get_default_kwargs import get_default_kwargs
from small_decoders import ATTENTIONS, SIZE, VOCABULARY
from small_encoders import assert_close
from small_lms import OPTIONS, SIZES, build, of, pair

from espnet_kv.decoder import search as search_module
from espnet_kv.errors import ConfigError, UserError
from espnet_kv.lm.transformer_lm import KVTransformerLM

attentions = pytest.mark.parametrize("attention", ATTENTIONS)


def tokens(*shape: int) -> torch.Tensor:
    """Token 0 is <blank>, which no token sees; <sos> begins."""
    ys = torch.randint(VOCABULARY, shape)
    ys[:, 0] = VOCABULARY - 1
    return ys


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
def test_training_forward_is_espnets(conf):
    stock, ours = pair(**conf)
    ys = tokens(3, 7)
    ys[1, 4:] = 0  # padding
    ys[2, 3] = 0
    assert_close(ours(ys, None)[0], stock(ys, None)[0])


def test_gradients_are_espnets():
    stock, ours = pair()
    ys, gradients = tokens(3, 7), []
    for model in (ours, stock):
        torch.logsumexp(model(ys, None)[0], dim=-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert list(gradients[0]) == list(gradients[1])
    for name, expected in gradients[1].items():
        assert_close(gradients[0][name], expected, 1e-4)


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
def test_scores_are_espnets(conf):
    """One hypothesis at a time, and several that fork, die and hold <blank>."""
    stock, ours = pair(**conf)
    x, ys = torch.randn(9, SIZE), tokens(1, 6)
    ys[0, 3] = 0
    states: dict = {model: model.init_state(x) for model in (ours, stock)}
    for length in range(1, 7):
        scores = []
        for model in (ours, stock):
            logp, states[model] = model.score(ys[0, :length], states[model], x)
            scores.append(logp)
        assert_close(*scores)

    states = {model: [model.batch_init_state(x)] * 3 for model in (ours, stock)}
    ys = tokens(3, 1)
    for parents in ([0, 1, 2], [2, 2, 0], [1, 0], [0, 0, 1, 1], [3, 2, 1, 0]):
        scores = []
        for model in (ours, stock):
            logp, new = model.batch_score(ys, states[model], x.expand(len(ys), *x.shape))
            scores.append(logp)
            states[model] = [new[parent] for parent in parents]
        assert_close(*scores)
        new = torch.randint(VOCABULARY, (len(parents), 1))
        new[0] = 0
        ys = torch.cat([ys[parents], new], dim=1)


@attentions
@pytest.mark.parametrize("pos_enc", [None, "sinusoidal"])
def test_a_token_at_a_time_is_the_training_forward(attention, pos_enc):
    model = build(**of(attention), pos_enc=pos_enc)
    ys = tokens(3, 1)
    states = [model.init_state(torch.randn(9, SIZE))] * 3
    for parents in ([0, 1, 2], [2, 2, 0], [1, 0], [0, 0, 1, 1], [3, 2, 1, 0]):
        scores, states = model.batch_score(ys, states, None)
        assert_close(scores, torch.log_softmax(model(ys, None)[0][:, -1], dim=-1))
        states = [states[parent] for parent in parents]
        new = torch.randint(VOCABULARY, (len(parents), 1))
        new[-1] = 0
        ys = torch.cat([ys[parents], new], dim=1)


@attentions
@pytest.mark.parametrize("utterances", [1, 2])
def test_tokens_that_nobody_lists_make_room(attention, utterances, monkeypatch):
    """A store of few slots: scores stay right, of earlier hypotheses too, and it stays small."""
    monkeypatch.setattr(search_module, "FIRST_SLOTS", 4)
    model = build(**of(attention))
    beam = 3
    rows = utterances * beam
    own = torch.arange(utterances).repeat_interleave(beam)
    ys = tokens(rows, 1)
    states = [model.batch_init_state(torch.randn(utterances, 9, SIZE))] * rows
    earlier: tuple | None = None
    for turn in range(24):
        if turn == 12:
            earlier = ys, states
        elif turn == 18:
            ys, states = earlier
        scores, states = model.batch_score(ys, states, None)
        assert_close(scores, torch.log_softmax(model(ys, None)[0][:, -1], dim=-1))
        parents = torch.randint(beam, (rows,)) + own * beam
        states = [states[parent] for parent in parents]
        ys = torch.cat([ys[parents], torch.randint(VOCABULARY, (rows, 1))], dim=1)
    search = states[0].search
    if attention != "linear":
        assert sum(search.held) < rows * 24
    assert search.nbytes_by_kind() == search.nbytes_analytic()
    assert search.nbytes_by_kind()["self"] <= search.capacity_by_kind()["self"]


def test_a_long_hypothesis():
    stock, ours = pair(pos_enc="sinusoidal")
    ys = tokens(1, 700)
    state = ours.init_state(None)
    for length in range(1, 701):
        scores, state = ours.score(ys[0, :length], state, None)
    assert_close(scores, torch.log_softmax(stock(ys, None)[0][0, -1], dim=-1), 1e-4)


@attentions
def test_bytes_are_those_of_tokens(attention):
    """Once per token of a hypothesis in each layer; linear: once per hypothesis."""
    model = build(**of(attention))
    ys, states = tokens(3, 1), [model.init_state(torch.randn(9, SIZE))] * 3
    for _ in range(4):
        _, states = model.batch_score(ys, states, None)
        ys = torch.cat([ys, ys[:, :1]], dim=1)
    float32, layers, sums = 4, 2, 4 * 4 * (4 + 1)  # H f (d_v + 1)
    of_token = {"mha": 2 * SIZE, "gqa": 2 * 2 * 4, "mla": 5, "linear": 0}[attention]
    of_hypothesis = layers * float32 * (sums if attention == "linear" else 4 * of_token)
    search = states[0].search
    assert search.nbytes_by_kind() == search.nbytes_analytic() == {"self": 3 * of_hypothesis}
    assert [state.nbytes for state in states] == [of_hypothesis] * 3


def test_a_cache_of_eight_bits_is_close():
    model = build()
    ys, results = tokens(2, 8), {}
    for cache_dtype in (None, "int8"):
        model.cache_dtype = cache_dtype
        states = [model.init_state(None)] * 2
        for length in range(1, 9):
            results[cache_dtype], states = model.batch_score(ys[:, :length], states, None)
    assert_close(results["int8"], results[None], 0.1)
    assert states[0].search.nbytes_by_kind() == states[0].search.nbytes_analytic()


@attentions
def test_scores_in_bfloat16_are_close(attention):
    model = build(**of(attention))
    ys, scores = tokens(2, 6), []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        states = [model.init_state(torch.randn(9, SIZE))] * 2
        for length in range(1, 7):
            logp, states = model.batch_score(ys[:, :length], states, None)
        assert logp.dtype == dtype
        scores.append(logp.float())
    assert_close(scores[1], scores[0], 0.1)


@attentions
@pytest.mark.parametrize("prepared", [False, True])
def test_a_quantised_model_scores_as_before(attention, prepared):
    """As ESPnet's --quantize_lm true does it, before or after prepare_search."""
    model = build(**of(attention))
    if prepared:
        model.prepare_search()
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    ys, scores = tokens(1, 4)[0], []
    for module in (model, small):
        state = module.init_state(torch.randn(9, SIZE))
        for length in range(1, 5):
            logp, state = module.score(ys[:length], state, None)
        scores.append(logp)
    assert_close(scores[1], scores[0], 0.5)


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ({"attention_type": "mqa"}, ["attention_type", "mqa", "gqa"]),
        ({"attention_conf": {"kv_rank": 3}}, ["attention_conf.kv_rank", "mha"]),
        ({"attention_type": "mla", "attention_conf": {"kv_rank": 0}}, ["kv_rank", "0"]),
        (
            {"attention_type": "mla", "attention_conf": {"kv_rank": [3, 4, 5]}},
            ["kv_rank", "3 values for 2 layers"],
        ),
        (
            {"attention_type": "linear", "attention_conf": {"decay": 0.9}},
            ["attention_conf.decay", "encoders"],
        ),
        ({"head": 3}, ["lm_conf.head", "3", "att_unit 16"]),
        ({"pos_enc": "rotary"}, ["lm_conf.pos_enc", "rotary", "sinusoidal"]),
        ({"units": 3}, ["lm_conf.units", "unit"]),
    ],
    ids=str,
)
def test_wrong_values_are_named(conf, words):
    with pytest.raises(ConfigError) as caught:
        build(**conf)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_checkpoints_go_both_ways_and_no_other_is_taken():
    stock, ours = pair()
    again = build(TransformerLM)
    again.load_state_dict(ours.state_dict(), strict=True)
    assert list(again.state_dict()) == list(ours.state_dict())
    with pytest.raises(UserError, match="linear_kv_down"):
        build(**of("mla")).load_state_dict(stock.state_dict(), strict=False)


def test_the_same_seed_starts_with_espnets_weights():
    weights = []
    for name in ("transformer", "kv_transformer"):
        torch.manual_seed(3)
        conf = LMTask.get_default_config() | {
            "lm": name,
            "lm_conf": SIZES,
            "token_list": ["a"] * VOCABULARY,
        }
        model = LMTask.build_model(argparse.Namespace(**conf))
        weights.append(model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_espnet_knows_it_and_its_arguments():
    """--print_config shows ESPnet's arguments and ours with their defaults."""
    assert lm_choices.get_class("kv_transformer") is KVTransformerLM
    stock, ours = (get_default_kwargs(cls) for cls in (TransformerLM, KVTransformerLM))
    assert stock.items() <= ours.items()
    assert set(ours) - set(stock) == {"attention_type", "attention_conf"}
