"""kv_transformer searches as ESPnet's decoder does: same hypotheses, same scores."""

import importlib
import sys
import types
import zlib

import pytest
import torch
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.batch_beam_search_online_sim import BatchBeamSearchOnlineSim
from espnet2.legacy.nets.beam_search import BeamSearch
from small_decoders import OPTIONS, SIZE, VOCABULARY, assert_same, pair, search


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
@pytest.mark.parametrize("beam", [1, 5, 10, 20])
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


@pytest.mark.parametrize("beam", [1, 4, 10])
@pytest.mark.parametrize("lm", [False, True], ids=["", "lm"])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_search_of_utterances_of_unequal_lengths(beam, lm, ctc_weight):
    stock, ours = pair()
    x, lengths = torch.randn(3, 20, SIZE), torch.tensor([20, 13, 7])
    results = [
        search(d, beam, ctc_weight, lm)(x, maxlenratio=0.5, x_lengths=lengths)
        for d in (ours, stock)
    ]
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("cls", [BatchBeamSearch, BeamSearch])
def test_search_that_keeps_hidden_states(cls):
    stock, ours = pair()
    x = torch.randn(12, SIZE)
    results = [
        search(d, 3, 0.3, cls=cls, return_hs=True)(x, maxlenratio=0.5) for d in (ours, stock)
    ]
    assert len(results[0][0].hs) > 1
    assert_same(*results)


class Bigram:
    """Stands in for KenLM's model, which ESPnet's n-gram scorers ask for one word at a time."""

    def __init__(self, path: str):
        self.path = path

    def NullContextWrite(self, state):
        state.word = ""

    def BaseScore(self, state, word, out_state) -> float:
        out_state.word = word
        return -(zlib.crc32(f"{state.word} {word}".encode()) % 1000) / 300


@pytest.mark.parametrize("scorer", ["NgramFullScorer", "NgramPartScorer"])
def test_search_with_an_ngram(scorer, monkeypatch):
    """A full scorer goes with the batched search, a partial one with the other."""
    kenlm = types.ModuleType("kenlm")
    kenlm.LanguageModel, kenlm.State = Bigram, types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kenlm", kenlm)
    ngram = importlib.import_module("espnet2.legacy.nets.scorers.ngram")
    tokens = [f"t{n}" for n in range(VOCABULARY - 1)] + ["<eos>"]
    stock, ours = pair()
    x, cls = torch.randn(12, SIZE), BatchBeamSearch if "Full" in scorer else BeamSearch
    results = [
        search(d, 3, 0.3, cls=cls, ngram=getattr(ngram, scorer)("any", tokens))(x, maxlenratio=0.5)
        for d in (ours, stock)
    ]
    assert "ngram" in results[0][0].scores
    assert_same(*results)


@pytest.mark.parametrize("blocks", [(8, 4, 2), (12, 6, 3)], ids=str)
def test_search_while_the_encoder_output_goes_on(blocks):
    """ESPnet's block-wise search: it adds frames, and goes back to earlier hypotheses."""
    stock, ours = pair()
    x, results = torch.randn(30, SIZE), []
    for decoder in (ours, stock):
        beam_search = search(decoder, 4, 0.3, cls=BatchBeamSearchOnlineSim)
        for name, frames in zip(("block", "hop"), blocks, strict=False):
            getattr(beam_search, f"set_{name}_size")(frames)
        beam_search.set_look_ahead(blocks[2])
        results.append(beam_search(x))
    assert_same(*results)


def test_a_primer_of_several_tokens():
    stock, ours = pair()
    x = torch.randn(9, SIZE)
    results = []
    for decoder in (ours, stock):
        beam_search = search(decoder, 3)
        beam_search.set_hyp_primer([VOCABULARY - 1, 4, 7])
        results.append(beam_search(x, maxlenratio=0.8))
    assert_same(*results)
