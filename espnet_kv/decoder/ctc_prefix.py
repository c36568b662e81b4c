"""CTC prefix scores without a loop over frames.

Shape letters: B utterances, N hypotheses, S scored tokens of each, T frames, V vocabulary.
"""

import torch
from espnet2.legacy.nets.ctc_prefix_score import CTCPrefixScoreTH
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from torch import Tensor


class FastCTCPrefixScorer(CTCPrefixScorer):
    """ESPnet's CTCPrefixScorer with the scores computed by `FastCTCPrefixScore`."""

    def batch_init_state(self, x: Tensor, xs_lengths: Tensor | None = None) -> None:
        """Begin the search of (T, D) or (B, T, D) encoder frames; ESPnet's first state is None."""
        super().batch_init_state(x, xs_lengths)
        # the same object, its forward probabilities computed by another method
        self.impl.__class__ = FastCTCPrefixScore


class FastCTCPrefixScore(CTCPrefixScoreTH):
    """ESPnet's CTCPrefixScoreTH (Watanabe et al. 2017, algorithm 2), all frames at once.

    Both forward recursions have the form r_t = log(exp(r_{t-1}) + exp(a_{t-1})) + x_t. With the
    running sum X_t of x they are r_t = X_t + log sum_{s <= t} exp(a_{s-1} - X_{s-1}), which is
    torch.logcumsumexp. X grows with the utterance, hence float64.

    A search without pre-beam (every token scored) and a windowed one stay ESPnet's.
    """

    def __call__(self, y, state, scoring_ids=None, att_w=None):
        """Scores of the next tokens.

        Args:
            y: (N, L) tokens with <sos>. state: of all but the last of them, None at first.
            scoring_ids: (N, S) tokens to score.

        Returns:
            (N, V) scores, which for tokens not asked for are very small, and the new state.
        """
        if scoring_ids is None or att_w is not None or self.margin > 0:
            return super().__call__(y, state, scoring_ids, att_w)
        count, length, frames = len(y), y.size(1) - 1, self.input_length
        self.scoring_num = scoring_ids.size(1)  # what ESPnet's index_select_state goes by
        utterance = torch.arange(count, device=self.device) // (count // self.batch)
        log_probs = self.x[0]  # (T, B, V)
        tokens = log_probs[:, utterance[:, None], scoring_ids].double()  # (T, N, S)
        blanks = log_probs[:, utterance, self.blank].double()  # (T, N)
        if state is None:
            in_blank = blanks.cumsum(0)
            in_token, before = torch.full_like(in_blank, self.logzero), 0.0
        else:
            (in_token, in_blank), before = state[0].double().unbind(1), state[1]
        total = torch.logaddexp(in_token, in_blank)  # (T, N)
        repeats = (scoring_ids == y[:, -1:])[None]  # a repeated token needs a blank between
        arrives = torch.where(repeats, in_blank[:, :, None], total[:, :, None])  # (T, N, S)

        start = min(max(length, 1), frames)
        first = torch.full_like(tokens[0], self.logzero)
        if length == 0:
            first = tokens[0]
        r = torch.full((frames, 2, *tokens.shape[1:]), self.logzero, dtype=torch.float64)
        r = r.to(self.device)  # (T, 2, N, S): ending in the token, ending in blank
        r[start - 1, 0] = first
        r[start:, 0] = _recursion(first, arrives[start - 1 : -1], tokens[start - 1 :])
        silent = blanks[start - 1 :, :, None].expand(-1, -1, tokens.size(2))
        never = torch.full_like(first, self.logzero)
        r[start:, 1] = _recursion(never, r[start - 1 : -1, 0], silent)

        reaches = torch.cat([arrives[start - 1 : -1] + tokens[start:], first[None]])
        log_psi = torch.full((count, self.odim), self.logzero, dtype=r.dtype, device=self.device)
        log_psi.scatter_(1, scoring_ids, torch.logsumexp(reaches, 0))
        log_psi[:, self.eos] = total[self.end_frames[utterance], torch.arange(count)]
        if self.eos != self.blank:
            log_psi[:, self.blank] = self.logzero
        log_psi = log_psi.to(self.dtype)
        places = torch.full((count, self.odim), -1, dtype=torch.long, device=self.device)
        scored = torch.arange(self.scoring_num, device=self.device).expand(count, -1)
        places.scatter_(1, scoring_ids, scored)
        return log_psi - before, (r.to(self.dtype), log_psi, 0, 0, places)


def _recursion(first: Tensor, arrives: Tensor, x: Tensor) -> Tensor:
    """r_t = log(exp(r_{t-1}) + exp(arrives_{t-1})) + x_t for t >= 1, where r_0 = first.

    Args:
        first: (N, S). arrives: (T-1, N, S), at frames 0 to T-2. x: (T, N, S).

    Returns:
        (T-1, N, S), r_1 to r_{T-1}.
    """
    x = torch.cat([torch.zeros_like(x[:1]), x[1:]]).cumsum(0)
    terms = torch.cat([first[None], arrives - x[:-1]])
    return torch.logcumsumexp(terms, 0)[1:] + x[1:]
