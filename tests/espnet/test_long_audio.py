"""Audio beyond Whisper's window: where it is cut, and what its parts give together."""

from types import SimpleNamespace

import pytest
import torch
from espnet2.bin.asr_inference import Hypothesis

from espnet_kv.espnet.long_audio import joined, windows

RATE, MOST = 16000, 480_000


@pytest.mark.parametrize("samples", [1, MOST, MOST + 1, 2 * MOST, 2 * MOST + 1, 1_500_000])
def test_the_parts_are_the_audio_and_as_few_as_possible(samples):
    speech = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    parts = windows(speech, MOST)
    assert torch.equal(torch.cat(parts), speech)
    assert len(parts) == -(-samples // MOST)
    assert all(0 < len(part) <= MOST for part in parts)


def test_it_is_cut_in_pauses():
    speech = torch.ones(70 * RATE)
    for second in (3.0, 21.5, 43.0):  # the first is too early
        speech[round(second * RATE) : round((second + 0.4) * RATE)] = 0.01
    ends = torch.tensor([len(part) for part in windows(speech, MOST)]).cumsum(0) / RATE
    assert len(ends) == 3 and 21.5 < ends[0] < 21.9 and 43 < ends[1] < 43.4


def hypothesis(*ids: int, score: float) -> Hypothesis:
    return Hypothesis(torch.tensor([1, *ids, 2]), score, {"decoder": score / 2})


def test_the_best_of_each_part_are_joined():
    best, second, third = (hypothesis(n, score=-n) for n in (5, 6, 7))
    results = [
        [(" one", ["a"], [5], best), ("two ", ["b"], [6], second)],
        [("", [], [], third)],
        [("three", ["c", "d"], [8, 9], best)],
    ]
    ((text, tokens, ids, together),) = joined(results)
    assert (text, tokens, ids) == ("one three", ["a", "c", "d"], [5, 8, 9])
    assert together.yseq.tolist() == [1, 5, 2, 1, 7, 2, 1, 5, 2]
    assert together.score == -17 and together.scores == {"decoder": -8.5}
    assert joined(results[:1]) == results[0]


def test_hypotheses_of_a_transducer_have_lists_and_no_scores():
    best = SimpleNamespace(yseq=[0, 5], score=-1.0)
    ((*_, together),) = joined([[("a", ["a"], [5], best)], [("b", ["b"], [5], best)]])
    assert together.yseq.tolist() == [0, 5, 0, 5] and together.score == -2 and not together.scores


def test_without_a_tokenizer_there_is_no_text():
    ids_only = [(None, ["5"], [5], hypothesis(5, score=-1))]
    assert joined([ids_only, ids_only])[0][:3] == (None, ["5", "5"], [5, 5])
