"""CTC prefix scores without a loop over frames.

Shape letters: B utterances, N hypotheses, S scored tokens of each, T frames, V vocabulary, M
selected hypotheses.
"""

from dataclasses import dataclass
from typing import Any

import torch
from espnet2.legacy.nets.ctc_prefix_score import CTCPrefixScoreTH
from espnet2.legacy.nets.scorers.ctc import CTCPrefixScorer
from torch import Tensor


class WideCTCPrefixScorer(CTCPrefixScorer):
    """ESPnet's CTCPrefixScorer with scores in float32 or wider, also for models of 16 bits.

    ESPnet's value for log 0 is outside the range of float16.
    """

    def __init__(self, ctc: Any, eos: int, window_margin: int = 0):
        super().__init__(_Wide(ctc), eos, window_margin)  # type: ignore[arg-type]


class _Wide:
    """A CTC module with log-probabilities in float32 or wider."""

    def __init__(self, ctc: Any):
        self._ctc = ctc

    def log_softmax(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        log_probs = self._ctc.log_softmax(x)
        return log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))


class FastCTCPrefixScorer(WideCTCPrefixScorer):
    """ESPnet's CTCPrefixScorer with the scores computed by `FastCTCPrefixScore`."""

    def batch_init_state(self, x: Tensor, xs_lengths: Tensor | None = None) -> None:
        """Begin the search in (T, D) or (B, T, D) encoder output; ESPnet's first state is None."""
        xs = x if x.dim() == 3 else x[None]
        if xs_lengths is None:
            xs_lengths = torch.full((xs.size(0),), xs.size(1), device=xs.device)
        log_probs = self.ctc.log_softmax(xs)
        self.impl = FastCTCPrefixScore(
            log_probs, xs_lengths.long(), 0, self.eos, margin=self.window_margin
        )

    def select_state(self, state: Any, i: int, new_id: int | None = None) -> Any:
        """The state of hypothesis i after token new_id."""
        if not isinstance(state, Scored):
            return super().select_state(state, i, new_id)
        device = state.last.device
        chosen = (torch.tensor([index], device=device) for index in (i, new_id))
        r, score, *window = self.impl.extend(state, *chosen)
        return (r[:, :, 0], score[0], *window)


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of the next tokens of hypotheses.

    Attributes:
        total: (T, N), log-probability that frames up to t emit the whole hypothesis.
        in_blank: (T, N), the part of `total` with blank at frame t.
        last: (N,), last token.
        length: number of tokens without <sos>.
        log_psi: (N, V), log-probability of all sequences that begin with hypothesis and token.
    """

    total: Tensor
    in_blank: Tensor
    last: Tensor
    length: int
    log_psi: Tensor

    def arrives(self, hyps: Tensor, tokens: Tensor) -> Tensor:
        """(..., T) log-probability that token (...,) may follow hypothesis (...,) after frame t."""
        repeats = tokens == self.last[hyps]  # a repeated token needs a blank between
        return torch.where(repeats[..., None], self.in_blank.t()[hyps], self.total.t()[hyps])


class FastCTCPrefixScore(CTCPrefixScoreTH):
    """ESPnet's CTCPrefixScoreTH (Watanabe et al. 2017, algorithm 2) for all frames at once.

    The score of a token is a sum over frames, without recursion. Only selected hypotheses need the
    two recursions. Both have the form r_t = log(exp(r_{t-1}) + exp(a_{t-1})) + x_t. With the
    cumulative sum X_t of x this is r_t = X_t + log sum_{s <= t} exp(a_{s-1} - X_{s-1}), computed
    by torch.logcumsumexp. X grows with the utterance, hence float64.

    A search without pre-beam (all tokens scored) and a windowed search use ESPnet's code.
    """

    _by_token: Tensor | None = None

    def __call__(self, y, state, scoring_ids=None, att_w=None):
        """Score the next tokens.

        Args:
            y: (N, L) tokens with <sos>. state: state before the last token; None at first.
            scoring_ids: (N, S) tokens to score.

        Returns:
            (N, V) scores, very small for tokens outside `scoring_ids`, and a `Scored`.
        """
        if scoring_ids is None or att_w is not None or self.margin > 0:
            return super().__call__(y, state, scoring_ids, att_w)
        count, length = len(y), y.size(1) - 1
        hyps = torch.arange(count, device=self.device)
        utterance = hyps // (count // self.batch)
        if state is None:
            in_blank = self.x[0, :, utterance, self.blank].double().cumsum(0)
            total, before = in_blank, 0.0
        else:
            (in_token, in_blank), before = state[0].double().unbind(1), state[1]
            total = torch.logaddexp(in_token, in_blank)
        log_psi = torch.full((count, self.odim), self.logzero, dtype=self.dtype, device=self.device)
        scored = Scored(total, in_blank, y[:, -1], length, log_psi)

        first, start = self._first(length)
        tokens = self._of_tokens(utterance[:, None], scoring_ids)  # (N, S, T)
        arrives = scored.arrives(hyps[:, None], scoring_ids)
        reaches = torch.logsumexp(arrives[..., start - 1 : -1] + tokens[..., start:], -1)
        reaches = torch.logaddexp(reaches, tokens[..., 0] if first else self._never(reaches))
        log_psi.scatter_(1, scoring_ids, reaches.to(self.dtype))
        log_psi[:, self.eos] = total[self.end_frames[utterance], hyps].to(self.dtype)
        if self.eos != self.blank:
            log_psi[:, self.blank] = self.logzero
        return log_psi - before, scored

    def extend(self, scored: Scored, parents: Tensor, tokens: Tensor) -> tuple:
        """ESPnet's state of M hypotheses: parents (M,) extended by tokens (M,).

        Returns:
            (T, 2, M) log-probability that frames up to t emit the hypothesis and end in its last
            token or in blank; (M, 1) log_psi; and an empty window.
        """
        utterance = parents // (len(scored.last) // self.batch)
        first, start = self._first(scored.length)
        x = self._of_tokens(utterance, tokens)  # (M, T)
        blanks = self._of_tokens(utterance, torch.full_like(tokens, self.blank))
        never = self._never(x[:, 0])
        r = torch.full((self.input_length, 2, len(tokens)), self.logzero, dtype=self.dtype)
        r = r.to(self.device)
        arrives = scored.arrives(parents, tokens)[:, start - 1 : -1]
        in_token = _recursion(x[:, 0] if first else never, arrives, x[:, start:])
        in_blank = _recursion(never, in_token[:, :-1], blanks[:, start:])
        r[start - 1 :, 0], r[start - 1 :, 1] = in_token.t(), in_blank.t()
        return r, scored.log_psi[parents, tokens][:, None], 0, 0

    def index_select_state(self, state, best_ids):
        """The state of the hypotheses selected by beam pruning.

        best_ids: (B, K), number of the hypothesis in its utterance * V + token.
        """
        if not isinstance(state, Scored):
            return super().index_select_state(state, best_ids)
        begins = self.idx_b[:, None] * (len(state.last) // self.batch)
        parents = (best_ids // self.odim + begins).flatten()
        return self.extend(state, parents, (best_ids % self.odim).flatten())

    def _first(self, length: int) -> tuple[bool, int]:
        """Whether the token may be the first token, at frame 0, and the first frame after that."""
        return length == 0, min(max(length, 1), self.input_length)

    def _never(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.logzero)

    def _of_tokens(self, utterances: Tensor, tokens: Tensor) -> Tensor:
        """(..., T) log-probabilities of tokens (...,) of utterances (...,)."""
        if self._by_token is None or self._by_token.size(2) != self.input_length:
            self._by_token = self.x[0].permute(1, 2, 0).contiguous()  # (B, V, T)
        return self._by_token[utterances, tokens].double()


def _recursion(first: Tensor, arrives: Tensor, x: Tensor) -> Tensor:
    """r_t = log(exp(r_{t-1}) + exp(arrives_{t-1})) + x_t for t >= 1, where r_0 = first.

    Args:
        first: (M,). arrives: (M, T), at frames 0 to T - 1. x: (M, T), at frames 1 to T.

    Returns:
        (M, T + 1), r_0 to r_T.
    """
    x = torch.nn.functional.pad(x.cumsum(1), (1, 0))
    terms = torch.cat([first[:, None], arrives - x[:, :-1]], dim=1)
    return torch.logcumsumexp(terms, 1) + x
