"""What a running stage tells its user: how far it is, and what it left out."""

import sys
import time
from collections.abc import Mapping

from espnet_kv.errors import UserError

SHOWN = 20
"""Warnings of one kind are printed up to this many; the rest are counted."""


class Progress:
    """Prints `  label: done/total` as steps are made, at most every two seconds."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.done = 0
        self._printed = time.monotonic()

    def step(self) -> None:
        """Count one more item."""
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self._printed >= 2:
            self._printed = now
            print(f"  {self.label}: {self.done}/{self.total}", flush=True)


def warn_each(label: str, reasons: Mapping[str, str], summary: str) -> None:
    """Warn on stderr of every utterance in `reasons`, then print how many: `N SUMMARY`."""
    if not reasons:
        return
    for utt in list(reasons)[:SHOWN]:
        print(f"warning: {label}: {utt}: {reasons[utt]}", file=sys.stderr)
    if len(reasons) > SHOWN:
        print(f"warning: {label}: ... and {len(reasons) - SHOWN} more", file=sys.stderr)
    print(f"warning: {label}: {len(reasons)} {summary}", file=sys.stderr, flush=True)


def refuse_mostly_dropped(label: str, dropped: Mapping[str, str], total: int) -> None:
    """Stop where more than half of `total` utterances were dropped.

    Raises:
        UserError: then a path or an option is wrong, not a few files.
    """
    if 2 * len(dropped) > total:
        utt, reason = next(iter(dropped.items()))
        raise UserError(
            f"{label}: {len(dropped)} of {total} utterances cannot be used "
            f"(the first: {utt}: {reason}); check the paths in wav.scp and the transcripts"
        )
