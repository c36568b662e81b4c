"""The decoder kv_whisper: parameters, training and scores are ESPnet's; the cache is exact."""

import pytest
import torch
from espnet2.asr.decoder.whisper_decoder import OpenAIWhisperDecoder
from small_encoders import assert_close
from small_whisper import (
    ATTENTIONS,
    DIMS,
    EOS,
    PRIMER,
    SIZE,
    SOS,
    VOCABULARY,
    WINDOW,
    decoder,
    decoders,
    of,
)

from espnet_kv.decoder.whisper_decoder import KVWhisperDecoder
from espnet_kv.errors import ConfigError, UserError

PAIRS = [(kind, kind) for kind in ATTENTIONS] + [("mla", "gqa"), ("linear", "mha"), ("mha", "mla")]


def test_keys_of_a_checkpoint_are_espnets():
    stock, ours = decoders()
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert "decoders.blocks.1.cross_attn.key.weight" in ours.state_dict()
    assert [tuple(p.shape) for p in ours.parameters()] == [
        tuple(p.shape) for p in stock.parameters()
    ]


@pytest.mark.parametrize("frames", [9, WINDOW])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY + 4, VOCABULARY - 4])
def test_training_forward_and_gradients_are_espnets(frames, vocabulary):
    options = {"load_origin_token_embedding": vocabulary > VOCABULARY, "vocabulary": vocabulary}
    stock, ours = decoders(**options)
    memory, lengths = torch.randn(3, frames, SIZE), torch.tensor([frames, frames - 2, 4])
    ys = torch.randint(vocabulary, (3, 6))
    results, gradients = [], []
    for model in (ours, stock):
        x, olens = model.train()(memory, lengths, ys, torch.tensor([6, 5, 3]))
        x.square().mean().backward()
        results.append(x.detach())
        gradients.append([p.grad for p in model.parameters()])
        assert olens.tolist() == [6, 5, 3]
    assert_close(*results, 1e-5)
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-4)


def test_dropout_of_the_same_seed_is_espnets():
    stock, ours = decoders(dropout_rate=0.3)
    memory, ys = torch.randn(2, 7, SIZE), torch.randint(VOCABULARY, (2, 5))
    results = []
    for model in (ours, stock):
        torch.manual_seed(3)
        results.append(model.train()(memory, torch.tensor([7, 7]), ys, torch.tensor([5, 5]))[0])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY + 4])
def test_scores_of_every_interface_are_espnets(prepared, vocabulary):
    stock, ours = decoders(load_origin_token_embedding=True, vocabulary=vocabulary)
    if prepared:
        ours.prepare_search()
    x, ys = torch.randn(12, SIZE), torch.tensor([*PRIMER, 8, 2])
    want, _ = stock.score(ys, None, x)
    assert_close(ours.score(ys, None, x)[0], want, 1e-5)
    assert_close(ours.forward_one_step(ys[None], torch.empty(0), x[None])[0][0], want, 1e-5)
    _, state = ours.score(ys[:-1], ours.init_state(x), x)
    assert_close(ours.score(ys, state, x)[0], want, 1e-5)
    _, cache = ours.forward_one_step(ys[None, :-2], torch.empty(0), x[None])
    again, cache = ours.forward_one_step(ys[None], torch.empty(0), x[None], cache=cache)
    assert_close(again[0], want, 1e-5)
    batch = torch.stack([ys, ys.flip(0)])
    xs = x.expand(2, *x.shape)
    scores, states = ours.batch_score(batch, [None, None], xs)
    assert_close(scores, stock.batch_score(batch, [None, None], xs)[0], 1e-5)
    assert len(states) == 2 and scores.dtype == torch.float32


@pytest.mark.parametrize(("own", "src"), PAIRS)
def test_cached_scores_are_those_of_a_whole_pass(own, src):
    """A hypothesis is forked, and its last scores equal training's forward."""
    model = decoder(**of(own, src))
    x = torch.randn(2, 11, SIZE)
    lengths = torch.tensor([11, 6])
    ys = torch.randint(VOCABULARY, (4, len(PRIMER) + 8))
    ys[:, : len(PRIMER)] = torch.tensor(PRIMER)
    xs = x.repeat_interleave(2, dim=0)
    mask = (torch.arange(11) < lengths.repeat_interleave(2)[:, None])[:, None]
    states = [model.batch_init_state(x, xs_lengths=lengths)] * 4
    for length in range(len(PRIMER), ys.size(1) + 1):
        scores, states = model.batch_score(ys[:, :length], states, xs, xs_mask=mask)
    for row in range(4):
        memory = xs[row : row + 1, : lengths[row // 2]]
        logits, _ = model(memory, torch.tensor([len(memory[0])]), ys[row : row + 1], None)
        assert_close(scores[row], logits[0, -1].log_softmax(-1), 1e-4)


@pytest.mark.parametrize(("own", "src"), PAIRS)
def test_bytes_of_the_storage_are_those_of_the_configuration(own, src):
    model = decoder(**of(own, src))
    x = torch.randn(1, 50, SIZE)
    ys, states = torch.randint(VOCABULARY, (3, 9)), [model.init_state(x[0])] * 3
    for length in range(4, 10):
        _, states = model.batch_score(ys[:, :length], states, x.expand(3, -1, -1))
    search = states[0].search
    assert search.nbytes_by_kind() == search.nbytes_analytic()
    if (own, src) == ("mha", "mha"):  # 2 D numbers of 4 bytes, 2 layers
        assert search.nbytes_by_kind() == {"self": 27 * 2 * 64 * 4, "cross": 50 * 2 * 64 * 4}


def test_the_primer_takes_one_call(monkeypatch):
    model, calls = decoder(), []
    run = KVWhisperDecoder.run_layers
    monkeypatch.setattr(
        KVWhisperDecoder, "run_layers", lambda self, x: calls.append(x.shape) or run(self, x)
    )
    model.score(torch.tensor(PRIMER), None, torch.randn(9, SIZE))
    assert calls == [(1, 4, SIZE)]


def test_frames_of_a_whole_window_are_all_visible():
    """Audio padded to 30 s: Whisper was trained with the silence."""
    stock, ours = decoders()
    x, ys = torch.randn(2, WINDOW, SIZE), torch.tensor([PRIMER, PRIMER])
    mask = torch.arange(WINDOW)[None, None] < torch.tensor([700, 300])[:, None, None]
    state = ours.batch_init_state(x, xs_lengths=torch.tensor([700, 300]))
    scores, _ = ours.batch_score(ys, [state, state], x, xs_mask=mask)
    assert_close(scores, stock.batch_score(ys, [None] * 2, x)[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_in_other_types(dtype):
    model = decoder()
    x, ys = torch.randn(9, SIZE), torch.tensor(PRIMER)
    want = model.score(ys, None, x)[0]
    scores, _ = model.to(dtype).score(ys, None, x)  # an encoder may give float32
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    assert scores.dtype == torch.float32
    assert_close(scores, want, tolerance)


def test_more_tokens_than_positions_are_refused():
    model = decoder()
    ys, x = torch.randint(VOCABULARY, (1, 449)), torch.randn(1, 5, SIZE)
    with pytest.raises(UserError, match=r"449 tokens .* 448 positions .* maxlenratio"):
        model.score(ys[0], None, x[0])
    with pytest.raises(UserError, match="449 tokens"):
        model(x, torch.tensor([5]), ys, torch.tensor([449]))
    assert model.score(ys[0, :448], None, x[0])[0].isfinite().all()


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"self_attention_type": "mlaa"}, "self_attention_type: unknown 'mlaa'"),
        ({"src_attention_conf": {"rank": 3}}, "src_attention_conf.rank"),
        ({"src_attention_type": "linear", "src_attention_conf": {"decay": 0.9}}, "decay"),
        (
            {"self_attention_type": "gqa", "self_attention_conf": {"num_kv_heads": 3}},
            "num_kv_heads",
        ),
        ({"dims": DIMS | {"n_text_state": 0}}, "dims.n_text_state"),
        ({"dims": {"n_vocab": 3}}, "dims: "),
        ({"whisper_model": "huge", "dims": None}, "'huge' is no file and no name of a model"),
        ({"load_origin_token_embedding": True, "vocab_size": 7}, "load_origin_token_embedding"),
        ({"encoder_output_size": 16}, "encoder's output has size 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_one_line(conf, message):
    given = {"vocab_size": VOCABULARY, "encoder_output_size": SIZE, "whisper_model": None}
    with pytest.raises(ConfigError, match=message) as caught:
        KVWhisperDecoder(**given | {"dims": DIMS} | conf)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_attention_is_refused():
    stock = decoder(OpenAIWhisperDecoder)
    with pytest.raises(UserError, match="does not fit KVWhisperDecoder"):
        decoder(**of("mla", "mla")).load_state_dict(stock.state_dict(), strict=False)


def test_tokens_are_distinct():
    assert len({SOS, EOS, *PRIMER}) == len(PRIMER) + 1
