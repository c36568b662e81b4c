"""Segmentation of a stream at pauses and at a maximum length."""

from collections.abc import Iterator, Sequence


class Endpointer:
    """Ends a segment after a pause, or at the maximum length.

    In the last quarter of the maximum length, a segment ends at the first frame whose best token
    is blank, to avoid a cut within a token.

    Args:
        blank: the CTC blank.
        silence_frames: consecutive blank frames that are a pause; 0 = pauses do not end segments.
        max_frames: maximum length of a segment in frames; 0 = no limit.
    """

    def __init__(self, blank: int, silence_frames: int = 0, max_frames: int = 0):
        self._blank = blank
        self._silence_frames, self._max_frames = silence_frames, max_frames
        self.reset()

    @property
    def active(self) -> bool:
        """Whether segments can end before the stream ends."""
        return self._silence_frames > 0 or self._max_frames > 0

    def reset(self) -> None:
        """Begin a segment."""
        self._frames = self._silent = 0

    def pieces(self, best: Sequence[int]) -> Iterator[tuple[slice, bool]]:
        """Split the next frames at the ends of segments.

        Args:
            best: the most probable token of each frame.

        Yields:
            (slice of `best` in one segment, whether the segment ends there).
        """
        start = 0
        for frame, token in enumerate(best, start=1):
            self._frames += 1
            self._silent = self._silent + 1 if token == self._blank else 0
            if self._ends():
                self.reset()
                yield slice(start, frame), True
                start = frame
        if start < len(best):
            yield slice(start, len(best)), False

    def _ends(self) -> bool:
        paused = 0 < self._silence_frames <= self._silent
        if not self._max_frames:
            return paused
        long = self._silent > 0 and self._frames >= 0.75 * self._max_frames
        return paused or long or self._frames >= self._max_frames
