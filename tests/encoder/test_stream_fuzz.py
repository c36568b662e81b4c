"""Whatever happens to streams, each gives what one pass over its utterance gives."""

import pickle
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_encoders import build, position_conf
from streams import STREAMED, Feeder, utterances

from espnet_kv.cache import EncoderState

NAMES = ("kv_conformer", "kv_branchformer", "kv_e_branchformer", "kv_transformer")
ACTIONS = ("feed", "feed", "feed", "select", "join", "meet", "reset", "pickle", "trade")


class Batch(Feeder):
    """A feeder whose streams come and go; the pieces of those that ended are kept to be checked."""

    def __init__(self, encoder: Any, data: st.DataObject, **conf: Any):
        self.data, self.conf = data, conf
        self.ended: list[tuple] = []
        super().__init__(encoder, self.new(1, 3), empty=1e4, **conf)

    def new(self, least: int, most: int) -> list[torch.Tensor]:
        """Some utterances of 1 to 20 frames."""
        return utterances(
            *self.data.draw(st.lists(st.integers(1, 20), min_size=least, max_size=most))
        )

    def rows(self) -> list[int]:
        """Some of the streams in any order."""
        everyone = st.permutations(range(len(self.xs)))
        return self.data.draw(everyone)[: self.data.draw(st.integers(1, len(self.xs)))]

    def act(self, action: str) -> None:
        """One of ACTIONS."""
        if action == "select":
            rows = self.rows()
            self._end(row for row in range(len(self.xs)) if row not in rows)
            self.select(rows)
        elif action == "join":
            self.join(Feeder(self.encoder, self.new(1, 2), empty=1e4, **self.conf))
        elif action == "meet":  # a batch that was itself taken from a running one
            new = Feeder(self.encoder, self.new(2, 3), empty=1e4, **self.conf)
            new.feed([self.data.draw(st.integers(1, 30)) for _ in new.xs])
            self._take(new, self.data.draw(st.sampled_from([[0], [1], [1, 0]])))
        elif action == "reset":
            rows = self.rows()
            self._end(rows)
            self.state.reset(rows)
            for row in rows:
                self.xs[row], self.fed[row], self.out[row] = self.new(1, 1)[0], 0, []
        elif action == "pickle":
            self.state = pickle.loads(pickle.dumps(self.state))
        elif action == "trade":  # both halves live on beside one another
            half = max(1, len(self.xs) // 2)
            kept = self.state
            self.state = kept.select(range(half))
            rest = kept.select(range(half, len(self.xs)))
            self._feed_some()
            self.state = EncoderState.join([self.state, rest])
        else:
            self.feed([self.data.draw(st.integers(1, 40)) for _ in self.xs])

    def _feed_some(self) -> None:
        """Feed the streams that the state has, the first ones."""
        names, count = ("xs", "fed", "out"), self.state.batch_size
        behind = {name: getattr(self, name)[count:] for name in names}
        for name in names:
            setattr(self, name, getattr(self, name)[:count])
        self.feed([self.data.draw(st.integers(1, 40)) for _ in self.xs])
        for name in names:
            setattr(self, name, getattr(self, name) + behind[name])

    def _take(self, new: Feeder, rows: list[int]) -> None:
        new.select(rows)
        self.join(new)

    def _end(self, rows: Any) -> None:
        """Streams that are given up: what they gave so far counts."""
        self.ended += [(self.xs[row][: self.fed[row]], self.out[row]) for row in rows]

    def check_all(self) -> None:
        """The streams that ended early gave the whole chunks of their audio."""
        self.run(size=23).check()
        state = self.state
        with self.encoder.chunks(chunk_size=state.chunk_size, left_chunks=state.left_chunks):
            for x, pieces in self.ended:
                got = torch.cat(pieces) if pieces else torch.zeros(0, 16)
                if len(got):
                    with torch.no_grad():
                        expected = self.encoder(x[None], torch.tensor([len(x)]))[0][0]
                    torch.testing.assert_close(got, expected[: len(got)], rtol=1e-5, atol=1e-5)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_streams_that_are_fed_joined_selected_reset_and_pickled(data):
    torch.manual_seed(0)
    name = data.draw(st.sampled_from(NAMES))
    attention = STREAMED[data.draw(st.sampled_from(sorted(STREAMED)))]
    position = position_conf(name, data.draw(st.booleans()))
    encoder = build(name, causal=True, num_blocks=1, **attention, **position)
    chunks = st.fixed_dictionaries(
        {"chunk_size": st.integers(1, 6), "left_chunks": st.integers(-1, 3)}
    )
    batches = [Batch(encoder, data, **data.draw(chunks)) for _ in range(2)]
    for _ in range(data.draw(st.integers(2, 7))):
        first, second = batches
        first.act(data.draw(st.sampled_from(ACTIONS)))
        batches = [second, first]
    for batch in batches:
        batch.check_all()
        assert batch.state.nbytes == batch.state.nbytes_analytic <= batch.state.capacity_bytes
