"""kv_transformer searches as ESPnet's decoder does: same hypotheses, same scores."""

import copy
from typing import Any

import pytest
import torch
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.beam_search import BeamSearch
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from espnet2.legacy.nets.scorers.length_bonus import LengthBonus
from espnet2.lm.transformer_lm import TransformerLM
from espnet2.utils.get_default_kwargs import get_default_kwargs
from small_encoders import assert_close

from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.errors import UserError

VOCABULARY, SIZE = 23, 16
SIZES = {"attention_heads": 4, "linear_units": 24, "num_blocks": 2}
OFF = {
    "dropout_rate": 0.0,
    "positional_dropout_rate": 0.0,
    "self_attention_dropout_rate": 0.0,
    "src_attention_dropout_rate": 0.0,
}
ATTENTIONS: dict[str, tuple[str, dict]] = {
    "mha": ("mha", {}),
    "gqa": ("gqa", {"num_kv_heads": 2}),
    "mla": ("mla", {"kv_rank": 5}),
    "linear": ("linear", {}),
}
attentions = pytest.mark.parametrize("attention", ATTENTIONS)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize_before": False},
    {"concat_after": True},
    {"qk_norm": True},
    {"num_blocks": 1, "attention_heads": 2},
]


def build(cls=KVTransformerDecoder, **conf: Any) -> torch.nn.Module:
    """A decoder with weights far from their start, in eval mode."""
    decoder = cls(VOCABULARY, SIZE, **SIZES | OFF | conf)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder.eval()


def pair(**conf: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """ESPnet's decoder and ours with its state dict, loaded strictly."""
    stock, ours = build(TransformerDecoder, **conf), build(**conf)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return stock, ours


def of(self_attention: str, src_attention: str) -> dict[str, Any]:
    kinds = {"self": ATTENTIONS[self_attention], "src": ATTENTIONS[src_attention]}
    return {f"{place}_attention_type": kind for place, (kind, _) in kinds.items()} | {
        f"{place}_attention_conf": conf for place, (_, conf) in kinds.items()
    }


def scorers(decoder: torch.nn.Module, ctc_weight: float, lm: bool) -> tuple[dict, dict]:
    """Scorers with the same weights for every decoder."""
    torch.manual_seed(5)
    ctc = CTC(VOCABULARY, SIZE)
    language_model = TransformerLM(VOCABULARY, embed_unit=8, att_unit=8, head=2, unit=8, layer=1)
    made = {
        "decoder": decoder,
        "ctc": CTCPrefixScorer(ctc, VOCABULARY - 1),
        "length_bonus": LengthBonus(VOCABULARY),
        "lm": language_model.eval(),
    }
    weights = {
        "decoder": 1 - ctc_weight,
        "ctc": ctc_weight,
        "length_bonus": 0.1,
        "lm": 0.5 if lm else 0.0,
    }
    return {k: v for k, v in made.items() if weights[k]}, weights


def search(
    decoder: torch.nn.Module,
    beam: int,
    ctc_weight: float = 0.0,
    lm: bool = False,
    cls: type = BatchBeamSearch,
):
    made, weights = scorers(decoder, ctc_weight, lm)
    return cls(
        scorers=made,
        weights=weights,
        beam_size=beam,
        vocab_size=VOCABULARY,
        sos=VOCABULARY - 1,
        eos=VOCABULARY - 1,
        pre_beam_score_key=None if ctc_weight in (0.0, 1.0) else "full",
    ).eval()


def assert_same(ours, stock) -> None:
    """The same n-best list: tokens exactly, every score to 1e-4."""
    assert len(ours) == len(stock) > 0
    for one, other in zip(ours, stock, strict=True):
        assert one.yseq.tolist() == other.yseq.tolist()
        assert_close(torch.as_tensor(one.score), torch.as_tensor(other.score), 1e-4)
        for name, score in other.scores.items():
            assert_close(torch.as_tensor(one.scores[name]), torch.as_tensor(score), 1e-4)


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
def test_training_forward_is_espnets(conf):
    stock, ours = pair(**conf)
    hs, hlens = torch.randn(2, 9, SIZE), torch.tensor([9, 6])
    ys, lens = torch.randint(VOCABULARY, (2, 5)), torch.tensor([5, 4])
    expected, _ = stock(hs, hlens, ys, lens)
    got, _ = ours(hs, hlens, ys, lens)
    for y, e, n in zip(got, expected, lens, strict=True):
        assert_close(y[:n], e[:n])


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_search_of_one_utterance(conf, beam, ctc_weight):
    stock, ours = pair(**conf)
    x = torch.randn(20, SIZE)
    results = [search(d, beam, ctc_weight)(x, maxlenratio=0.6) for d in (ours, stock)]
    assert_same(*results)


@pytest.mark.parametrize(
    "settings",
    [
        {"beam": 10, "ctc_weight": 0.3, "lm": True},
        {"beam": 20},
        {"beam": 4, "cls": BeamSearch},
        {"beam": 4, "cls": BeamSearch, "ctc_weight": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("ratios", [(0.0, 0.0), (0.9, 0.4), (-6, 0.0)], ids=str)
def test_search_with_other_scorers_and_lengths(settings, ratios):
    stock, ours = pair()
    x = torch.randn(12, SIZE)
    results = [search(d, **settings)(x, *ratios) for d in (ours, stock)]
    assert_same(*results)


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_search_of_utterances_of_unequal_lengths(ctc_weight):
    stock, ours = pair()
    x, lengths = torch.randn(3, 20, SIZE), torch.tensor([20, 13, 7])
    results = [
        search(d, 4, ctc_weight)(x, maxlenratio=0.5, x_lengths=lengths) for d in (ours, stock)
    ]
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


def test_a_primer_of_several_tokens():
    stock, ours = pair()
    x = torch.randn(9, SIZE)
    results = []
    for decoder in (ours, stock):
        beam_search = search(decoder, 3)
        beam_search.set_hyp_primer([VOCABULARY - 1, 4, 7])
        results.append(beam_search(x, maxlenratio=0.8))
    assert_same(*results)


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


@attentions
def test_bytes_are_those_of_tokens_and_frames(attention):
    """Once per token of a hypothesis, once per frame of an utterance, in each layer."""
    decoder = build(**of(attention, attention))
    x = torch.randn(11, SIZE)
    ys, states = torch.randint(VOCABULARY, (3, 1)), [decoder.batch_init_state(x)] * 3
    for _ in range(4):
        _, states = decoder.batch_score(ys, states, x.expand(3, *x.shape))
        ys = torch.cat([ys, ys[:, :1]], dim=1)
    numbers = {"mha": 2 * SIZE, "gqa": 2 * 2 * 4, "mla": 5}.get(attention, 0)
    cross = 4 * 4 * 5 * 4 if attention == "linear" else 11 * numbers
    assert states[0].search.nbytes_by_kind() == {
        "self": 2 * 3 * 4 * numbers * 4,
        "cross": 2 * (cross if attention == "linear" else cross * 4),
    }


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
