"""kv_transformer token by token: its scores, its bytes, its options."""

import copy

import pytest
import torch
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.utils.get_default_kwargs import get_default_kwargs
from small_decoders import ATTENTIONS, OPTIONS, SIZE, VOCABULARY, build, of, pair, search
from small_encoders import assert_close

from espnet_kv.decoder import search as search_module
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.errors import UserError

attentions = pytest.mark.parametrize("attention", ATTENTIONS)


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
def test_training_forward_is_espnets(conf):
    stock, ours = pair(**conf)
    hs, hlens = torch.randn(2, 9, SIZE), torch.tensor([9, 6])
    ys, lens = torch.randint(VOCABULARY, (2, 5)), torch.tensor([5, 4])
    expected, _ = stock(hs, hlens, ys, lens)
    got, _ = ours(hs, hlens, ys, lens)
    for y, e, n in zip(got, expected, lens, strict=True):
        assert_close(y[:n], e[:n])


@attentions
@pytest.mark.parametrize("src", ATTENTIONS)
def test_a_token_at_a_time_is_the_training_forward(attention, src):
    """Every self- and cross-attention, for hypotheses that fork and die."""
    decoder = build(**of(attention, src))
    x = torch.randn(11, SIZE)
    ys = torch.randint(VOCABULARY, (3, 1))
    states = [decoder.batch_init_state(x)] * 3
    for parents in ([0, 1, 2], [2, 2, 0], [1, 0], [0, 0, 1, 1], [3, 2, 1, 0]):
        scores, states = decoder.batch_score(ys, states, x.expand(len(ys), *x.shape))
        lens = torch.full((len(ys),), ys.size(1))
        expected, _ = decoder(x.expand(len(ys), *x.shape), torch.full_like(lens, 11), ys, lens)
        assert_close(scores, torch.log_softmax(expected[:, -1], dim=-1))
        states = [states[parent] for parent in parents]
        new = torch.randint(VOCABULARY, (len(parents), 1))
        ys = torch.cat([ys[parents], new], dim=1)


@attentions
def test_several_padded_utterances_are_each_alone(attention):
    decoder = build(**of(attention, attention))
    x, lengths = torch.randn(2, 14, SIZE), torch.tensor([14, 8])
    x[1, 8:] = 100.0
    ys = torch.randint(VOCABULARY, (4, 1))
    states = [decoder.batch_init_state(x, xs_lengths=lengths)] * 4
    for _ in range(4):
        scores, states = decoder.batch_score(ys, states, x.repeat_interleave(2, dim=0))
        for n, tokens in enumerate(ys):
            alone = x[n // 2, : lengths[n // 2]]
            lens = torch.tensor([ys.size(1)])
            expected, _ = decoder(alone[None], lengths[n // 2][None], tokens[None], lens)
            assert_close(scores[n], torch.log_softmax(expected[0, -1], dim=-1))
        ys = torch.cat([ys, torch.randint(VOCABULARY, (4, 1))], dim=1)


def test_hidden_states_are_returned_on_request():
    stock, ours = pair()
    x, ys = torch.randn(9, SIZE), torch.tensor([3])
    logp, hidden, _ = ours.score(ys, ours.init_state(x), x, return_hs=True)
    stock_logp, stock_hidden, _ = stock.score(ys, None, x, return_hs=True)
    assert_close(logp, stock_logp)
    assert_close(hidden, stock_hidden[0])


def test_without_a_state_one_is_made():
    """Searches that do not ask for initial states pass None, as to ESPnet's decoder."""
    stock, ours = pair()
    xs, ys = torch.randn(2, 9, SIZE), torch.randint(VOCABULARY, (2, 1))
    mask = torch.tensor([[[True] * 9], [[True] * 5 + [False] * 4]])
    got, _ = ours.batch_score(ys, [None, None], xs, xs_mask=mask)
    expected, _ = stock.batch_score(ys, [None, None], xs, xs_mask=mask)
    assert_close(got, expected)


def test_padded_encoder_output_that_goes_on():
    stock, ours = pair()
    ys, x = torch.randint(VOCABULARY, (4, 3)), torch.randn(2, 12, SIZE)
    lengths_at_last = torch.tensor([12, 9])
    states: dict = {
        stock: [None] * 4,
        ours: [ours.batch_init_state(x[:, :7], lengths_at_last - 5)] * 4,
    }
    for length, frames in enumerate((7, 7, 12), start=1):
        xs = x[:, :frames].repeat_interleave(2, dim=0)
        lengths = (lengths_at_last + frames - 12).repeat_interleave(2)
        mask, scored = (torch.arange(frames) < lengths[:, None])[:, None], []
        for decoder in (ours, stock):
            scores, states[decoder] = decoder.batch_score(
                ys[:, :length], states[decoder], xs, xs_mask=mask
            )
            scored.append(scores)
        assert_close(*scored)


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
def test_one_step_forward_is_espnets(conf):
    """forward_one_step, whose caller keeps the layer outputs."""
    stock, ours = pair(**conf)
    x, ys = torch.randn(2, 9, SIZE), torch.randint(VOCABULARY, (2, 4))
    caches: dict = {stock: None, ours: None}
    for length in range(1, 5):
        mask, results = torch.ones(1, length, length).tril().bool(), []
        for decoder in (ours, stock):
            scores, caches[decoder] = decoder.forward_one_step(
                ys[:, :length], mask, x, cache=caches[decoder]
            )
            results.append(scores)
        assert_close(*results)


@attentions
@pytest.mark.parametrize("utterances", [1, 2])
def test_tokens_that_nobody_lists_make_room(attention, utterances, monkeypatch):
    """A store of few slots: scores stay right, of earlier hypotheses too, and it stays small."""
    monkeypatch.setattr(search_module, "FIRST_SLOTS", 4)
    decoder = build(**of(attention, attention))
    beam, xs = 3, torch.randn(utterances, 7, SIZE)
    rows = utterances * beam
    own = torch.arange(utterances).repeat_interleave(beam)
    ys = torch.randint(VOCABULARY, (rows, 1))
    states = [decoder.batch_init_state(xs)] * rows
    earlier: tuple | None = None
    for turn in range(24):
        if turn == 12:
            earlier = ys, states
        elif turn == 18:
            ys, states = earlier
        scores, states = decoder.batch_score(ys, states, xs[own])
        lens = torch.full((rows,), ys.size(1))
        expected, _ = decoder(xs[own], torch.full_like(lens, 7), ys, lens)
        assert_close(scores, torch.log_softmax(expected[:, -1], dim=-1))
        parents = torch.randint(beam, (rows,)) + own * beam
        states = [states[parent] for parent in parents]
        ys = torch.cat([ys[parents], torch.randint(VOCABULARY, (rows, 1))], dim=1)
    search = states[0].search
    if attention != "linear":
        assert sum(search.held) < rows * 24
    assert search.nbytes_by_kind()["self"] == search.nbytes_analytic()["self"]
    assert search.nbytes_by_kind()["self"] <= search.capacity_by_kind()["self"]


@attentions
def test_bytes_are_those_of_tokens_and_frames(attention):
    """Once per token of a hypothesis, once per frame of an utterance, in each layer."""
    decoder = build(**of(attention, attention))
    x = torch.randn(11, SIZE)
    ys, states = torch.randint(VOCABULARY, (3, 1)), [decoder.batch_init_state(x)] * 3
    for _ in range(4):
        _, states = decoder.batch_score(ys, states, x.expand(3, *x.shape))
        ys = torch.cat([ys, ys[:, :1]], dim=1)
    float32, layers, sums = 4, 2, 4 * 4 * (4 + 1)  # H f (d_v + 1)
    of_token = {"mha": 2 * SIZE, "gqa": 2 * 2 * 4, "mla": 5, "linear": 0}[attention]
    of_hypothesis = sums if attention == "linear" else 4 * of_token
    of_utterance = sums if attention == "linear" else 11 * of_token
    search = states[0].search
    assert search.nbytes_by_kind() == search.nbytes_analytic()
    assert search.nbytes_by_kind() == {
        "self": 3 * layers * of_hypothesis * float32,
        "cross": layers * of_utterance * float32,
    }
    assert [state.nbytes for state in states] == [layers * of_hypothesis * float32] * 3


def test_a_search_leaves_nothing_behind_in_the_model():
    decoder = build()
    before = copy.deepcopy(decoder.state_dict())
    search(decoder, 5)(torch.randn(12, SIZE), maxlenratio=0.5)
    assert before.keys() == decoder.state_dict().keys()
    assert not [k for k, v in vars(decoder).items() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ({"self_attention_type": "mqa"}, ["self_attention_type", "mqa", "gqa"]),
        ({"src_attention_conf": {"kv_rank": 3}}, ["src_attention_conf.kv_rank", "mha"]),
        (
            {"self_attention_type": "linear", "self_attention_conf": {"decay": 0.9}},
            ["self_attention_conf.decay", "encoders"],
        ),
        ({"attention_heads": 3}, ["attention_heads", "3"]),
        ({"attention_type": "mla"}, ["attention_type", "self_attention_type"]),
    ],
    ids=str,
)
def test_wrong_values_are_named(conf, words):
    with pytest.raises(ValueError) as caught:
        build(**conf)
    assert all(word in str(caught.value) for word in words)


def test_a_checkpoint_that_does_not_fit_is_refused():
    stock, ours = build(TransformerDecoder), build(**of("mla", "mha"))
    with pytest.raises(UserError, match="linear_kv_down"):
        ours.load_state_dict(stock.state_dict(), strict=False)


def test_arguments_are_listed_for_espnet():
    """--print_config shows ESPnet's arguments and ours with their defaults."""
    stock, ours = (get_default_kwargs(cls) for cls in (TransformerDecoder, KVTransformerDecoder))
    assert stock.items() <= ours.items()
    assert set(ours) - set(stock) == {
        f"{place}_attention_{key}" for place in ("self", "src") for key in ("type", "conf")
    }


def test_espnet_knows_it():
    from espnet2.tasks import asr

    assert asr.decoder_choices.get_class("kv_transformer") is KVTransformerDecoder
