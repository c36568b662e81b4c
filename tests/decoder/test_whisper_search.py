"""kv_whisper searches as ESPnet's decoder does: same hypotheses, same scores."""

import logging
from types import SimpleNamespace

import pytest
import torch
from espnet2.legacy.nets.beam_search import BeamSearch
from small_whisper import (
    EOS,
    PRIMER,
    SIZE,
    VOCABULARY,
    WINDOW,
    assert_same,
    decoder,
    decoders,
    search,
)

from espnet_kv.espnet.inference import limit_length


def limit(beam_search, model) -> None:
    """Limit a search as Speech2Text limits its own."""
    parts = SimpleNamespace(beam_search=beam_search, asr_model=SimpleNamespace(decoder=model))
    limit_length(parts)


@pytest.mark.parametrize("beam", [1, 5, 10])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
@pytest.mark.parametrize("frames", [20, WINDOW])
def test_search_of_one_utterance(beam, ctc_weight, frames):
    stock, ours = decoders()
    x = torch.randn(frames, SIZE)
    results = [search(d, beam, ctc_weight)(x, maxlenratio=-9) for d in (ours, stock)]
    assert_same(*results)


@pytest.mark.parametrize("ratios", [(0.0, 0.0), (0.9, 0.4), (-30, 0.0)], ids=str)
@pytest.mark.parametrize("cls", [None, BeamSearch])
@pytest.mark.parametrize("primer", [None, PRIMER[:2], PRIMER], ids=["one", "two", "four"])
def test_search_with_lengths_and_primers(ratios, cls, primer):
    stock, ours = decoders()
    ours.prepare_search()
    x = torch.randn(12, SIZE)
    options = {"primer": primer} | ({} if cls is None else {"cls": cls})
    results = [search(d, 4, 0.3, **options)(x, *ratios) for d in (ours, stock)]
    assert_same(*results)


@pytest.mark.parametrize("beam", [1, 5, 10])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_search_of_four_utterances_padded_to_30_s(beam, ctc_weight):
    stock, ours = decoders()
    x, lengths = torch.randn(4, WINDOW, SIZE), torch.tensor([WINDOW, 700, 30, 9])
    results = [
        search(d, beam, ctc_weight)(x, maxlenratio=-6, x_lengths=lengths) for d in (ours, stock)
    ]
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("beam", [1, 5, 10])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_search_of_four_utterances_of_unequal_lengths(beam, ctc_weight):
    """Frames beyond an utterance have no effect: results are those of ESPnet, one by one."""
    stock, ours = decoders()
    x, lengths = torch.randn(4, 25, SIZE), torch.tensor([25, 17, 25, 8])
    found = search(ours, beam, ctc_weight)(x, maxlenratio=-9, x_lengths=lengths)
    for one, frames, length in zip(found, x, lengths, strict=True):
        alone = search(stock, beam, ctc_weight)(frames[:length], maxlenratio=-9)
        # an utterance with few frames has hypotheses that CTC gives no probability: all tie
        one, alone = ([h for h in nbest if h.score > -1e6] for nbest in (one, alone))
        assert_same(one, alone)


@pytest.mark.parametrize("cls", [None, BeamSearch])
def test_hypotheses_end_at_the_last_position(cls, caplog):
    """Audio of 30 s would allow 1500 tokens, but the decoder has 448 positions."""
    model = decoder()
    model.text_positions = 24
    beam_search = search(model, 3, **({} if cls is None else {"cls": cls}))
    limit(beam_search, model)
    with torch.no_grad():  # <eos> is never likely
        model.decoders.ln.bias.zero_()
        model.decoders.token_embedding.weight[EOS] = 0
        model.decoders.token_embedding.weight[:EOS] *= 9
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            best = beam_search(torch.randn(60, SIZE))[0]
            assert len(best.yseq) == 24 + 2 and best.yseq[-1] == EOS
    assert sum("24 tokens" in record.message for record in caplog.records) == 1


def test_a_shorter_limit_stays():
    model = decoder()
    limited, free = search(model, 3), search(model, 3)
    limit(limited, model)
    x = torch.randn(12, SIZE)
    assert_same(limited(x, maxlenratio=-7), free(x, maxlenratio=-7))
    assert VOCABULARY > EOS
