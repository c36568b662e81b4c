"""CTC prefix scores of all frames at once are those of ESPnet's loop over frames."""

import pytest
import torch
from espnet2.asr.ctc import CTC
from espnet2.legacy.nets.ctc_prefix_score import CTCPrefixScoreTH
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from small_decoders import SIZE, VOCABULARY, assert_same, build, search
from small_encoders import assert_close

from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScore, FastCTCPrefixScorer

EOS = VOCABULARY - 1
IMPOSSIBLE = -1e9  # ESPnet's zero probability and sums with it lie below


def scores(cls, log_probs, lengths, choices, hyps):
    """Scores of each step of a search that takes the given choices, in the given precision."""
    scorer = CTCPrefixScoreTH(log_probs.clone(), lengths, 0, EOS)
    scorer.__class__ = cls
    y = torch.full((len(lengths) * hyps, 1), EOS)
    state, got = None, []
    for ids, best in choices:
        score, state = scorer(y, state, ids)
        got.append(score)
        state = scorer.index_select_state(state, best)
        flat = best + (torch.arange(len(lengths)) * hyps * VOCABULARY)[:, None]
        parents, tokens = flat.flatten() // VOCABULARY, flat.flatten() % VOCABULARY
        y = torch.cat([y[parents], tokens[:, None]], dim=1)
    return got


def choose(batch: int, hyps: int, steps: int, scored: int) -> list:
    """Tokens to score and hypotheses to go on with, repetitions of a token among them."""
    made = []
    for _ in range(steps):
        pick = [torch.randperm(VOCABULARY - 3)[:scored] + 1 for _ in range(batch * hyps)]
        ids = torch.stack(pick)
        ids[:, 0] = 1
        ids[:, 1:][ids[:, 1:] == 1] = VOCABULARY - 2
        parents, which = torch.randint(hyps, (batch, hyps)), torch.randint(scored, (batch, hyps))
        which[:, 0] = 0
        rows = parents + torch.arange(batch)[:, None] * hyps
        made.append((ids, parents * VOCABULARY + ids[rows, which]))
    return made


@pytest.mark.parametrize("frames", [[1], [3], [40], [300], [40, 25, 7]], ids=str)
@pytest.mark.parametrize("sharp", [1.0, 20.0], ids=["flat", "sharp"])
def test_scores_are_espnets(frames, sharp):
    """Prefixes longer than the utterance included; in float64, where neither rounds."""
    lengths = torch.tensor(frames)
    logits = torch.randn(len(frames), max(frames), VOCABULARY, dtype=torch.float64)
    log_probs = (sharp * logits).log_softmax(dim=-1)
    choices = choose(len(frames), hyps=3, steps=6, scored=5)
    pairs = [
        scores(cls, log_probs, lengths, choices, 3)
        for cls in (FastCTCPrefixScore, CTCPrefixScoreTH)
    ]
    for fast, stock in zip(*pairs, strict=True):
        possible = stock > IMPOSSIBLE
        assert torch.equal(possible, fast > IMPOSSIBLE)
        # a difference of two impossible prefixes is a number without meaning, in both
        assert_close(fast[possible], stock[possible], 1e-5)


def test_float32_loses_nothing():
    """As near to the truth as ESPnet's own float32, over a long utterance."""
    log_probs = (3 * torch.randn(1, 800, VOCABULARY)).log_softmax(dim=-1)
    choices, lengths = choose(1, 4, 5, 6), torch.tensor([800])
    exact = scores(CTCPrefixScoreTH, log_probs.double(), lengths, choices, 4)
    stock = scores(CTCPrefixScoreTH, log_probs, lengths, choices, 4)
    fast = scores(FastCTCPrefixScore, log_probs, lengths, choices, 4)
    for e, s, f in zip(exact, stock, fast, strict=True):
        possible = e > IMPOSSIBLE
        error = [(x.double() - e)[possible].abs().max().item() for x in (s, f)]
        assert error[1] <= 1.5 * error[0] + 1e-4


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("ctc_weight", [0.3, 1.0])
@pytest.mark.parametrize("utterances", [1, 3])
def test_searches_agree(beam, ctc_weight, utterances):
    decoder = build()
    x = torch.randn(utterances, 24, SIZE)
    lengths = torch.tensor([24, 15, 9])[:utterances]
    ctc = CTC(VOCABULARY, SIZE)
    results = []
    for cls in (FastCTCPrefixScorer, CTCPrefixScorer):
        beam_search = search(decoder, beam, ctc_weight)
        scorer = cls(ctc, EOS)
        for scorers in (beam_search.scorers, beam_search.part_scorers):
            if "ctc" in scorers:
                scorers["ctc"] = scorer
        if utterances == 1:
            results.append([beam_search(x[0], maxlenratio=0.5)])
        else:
            results.append(beam_search(x, maxlenratio=0.5, x_lengths=lengths))
    for fast, stock in zip(*results, strict=True):
        assert_same(fast, stock)
