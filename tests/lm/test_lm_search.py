"""A search with the language model kv_transformer finds what one with ESPnet's finds."""

import pytest
import torch
from espnet2.legacy.nets.batch_beam_search import BatchBeamSearch
from espnet2.legacy.nets.batch_beam_search_online_sim import BatchBeamSearchOnlineSim
from espnet2.legacy.nets.beam_search import BeamSearch
from espnet2.legacy.nets.beam_search_timesync import BeamSearchTimeSync
from small_decoders import SIZE, VOCABULARY, assert_same, scorers, search
from small_decoders import pair as decoders
from small_lms import OPTIONS, build, pair

TOLERANCE = 1e-5


def sides(**conf):
    """(decoder, language model) of ours and of ESPnet's, with the same weights."""
    return zip(reversed(decoders()), reversed(pair(**conf)), strict=True)


def assert_scores(ours, stock) -> None:
    """The same tokens, and total scores to a relative difference of 1e-5."""
    assert_same(ours, stock)
    for one, other in zip(ours, stock, strict=True):
        assert float(one.score) == pytest.approx(float(other.score), rel=TOLERANCE)


@pytest.mark.parametrize("conf", OPTIONS, ids=str)
@pytest.mark.parametrize("beam", [1, 5, 10])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_search_of_one_utterance(conf, beam, ctc_weight):
    x = torch.randn(20, SIZE)
    assert_scores(
        *(
            search(decoder, beam, ctc_weight, language_model=lm)(x, maxlenratio=0.6)
            for decoder, lm in sides(**conf)
        )
    )


@pytest.mark.parametrize("cls", [BatchBeamSearch, BeamSearch])
@pytest.mark.parametrize("ratios", [(0.0, 0.0), (0.9, 0.4), (-6, 0.0)], ids=str)
def test_search_with_other_lengths(cls, ratios):
    x = torch.randn(12, SIZE)
    assert_scores(
        *(
            search(decoder, 4, 0.3, cls=cls, language_model=lm)(x, *ratios)
            for decoder, lm in sides()
        )
    )


@pytest.mark.parametrize("beam", [1, 5, 10])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_search_of_utterances_of_unequal_lengths(beam, ctc_weight):
    x, lengths = torch.randn(4, 20, SIZE), torch.tensor([20, 13, 16, 7])
    results = [
        search(decoder, beam, ctc_weight, language_model=lm)(x, maxlenratio=0.5, x_lengths=lengths)
        for decoder, lm in sides(pos_enc="sinusoidal")
    ]
    for one, other in zip(*results, strict=True):
        assert_scores(one, other)


def test_search_while_the_encoder_output_goes_on():
    """ESPnet's block-wise search: it goes back to earlier hypotheses."""
    x, results = torch.randn(30, SIZE), []
    for decoder, lm in sides():
        beam_search = search(decoder, 4, 0.3, cls=BatchBeamSearchOnlineSim, language_model=lm)
        beam_search.set_block_size(8)
        beam_search.set_hop_size(4)
        beam_search.set_look_ahead(2)
        results.append(beam_search(x))
    assert_scores(*results)


def test_search_frame_by_frame():
    """ESPnet's --time_sync true scores a prefix again and again."""
    x, results = torch.randn(12, SIZE), []
    for decoder, lm in sides():
        made, weights = scorers(decoder, 0.3, lm=True)
        made |= {"lm": lm, "ctc": made["ctc"].ctc}
        beam_search = BeamSearchTimeSync(
            sos=VOCABULARY - 1,
            beam_size=3,
            scorers=made,
            weights=weights,
            token_list=[str(n) for n in range(VOCABULARY)],
        )
        results.append(beam_search(x))
    for one, other in zip(*results, strict=True):
        assert one.yseq.tolist() == other.yseq.tolist()
        assert float(one.score) == pytest.approx(float(other.score), rel=TOLERANCE)


def test_a_primer_of_several_tokens():
    x, results = torch.randn(9, SIZE), []
    for decoder, lm in sides():
        beam_search = search(decoder, 3, language_model=lm)
        beam_search.set_hyp_primer([VOCABULARY - 1, 4, 7])
        results.append(beam_search(x, maxlenratio=0.8))
    assert_scores(*results)


def test_search_in_bfloat16():
    """Rounding differs, so that other hypotheses may win: the scores are compared."""
    x, results = torch.randn(12, SIZE), []
    for decoder, lm in sides():
        beam_search = search(decoder, 5, language_model=lm).to(torch.bfloat16)
        results.append(beam_search(x.bfloat16(), maxlenratio=-5)[0])
    assert float(results[0].score) == pytest.approx(float(results[1].score), rel=0.03)


def test_a_search_leaves_nothing_behind_in_the_model():
    _, decoder = decoders()
    lm = build()
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    search(decoder, 5, language_model=lm)(torch.randn(12, SIZE), maxlenratio=0.5)
    assert all(torch.equal(before[key], value) for key, value in lm.state_dict().items())
    assert not [k for k, v in vars(lm).items() if isinstance(v, torch.Tensor)]
