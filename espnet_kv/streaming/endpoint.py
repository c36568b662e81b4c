"""Where a stream is cut into segments."""

from collections.abc import Iterator, Sequence


class Endpointer:
    """Ends a segment after a pause, and in any case after a longest duration.

    A segment that grows long ends in the last quarter of that duration at the first frame whose
    best token is blank, so that tokens stay whole where they can.

    Args:
        blank: the CTC blank.
        silence_frames: blank frames in a row that make a pause; 0 = pauses end nothing.
        max_frames: longest duration of a segment in frames; 0 = any.
    """

    def __init__(self, blank: int, silence_frames: int = 0, max_frames: int = 0):
        self._blank = blank
        self._silence_frames, self._max_frames = silence_frames, max_frames
        self.reset()

    @property
    def active(self) -> bool:
        """Whether segments end before the stream does."""
        return self._silence_frames > 0 or self._max_frames > 0

    def reset(self) -> None:
        """Begin a segment."""
        self._frames = self._silent = 0

    def pieces(self, best: Sequence[int]) -> Iterator[tuple[slice, bool]]:
        """Divide the next frames among segments.

        Args:
            best: the most probable token of each frame.

        Yields:
            (frames of one segment, whether it ends with them), together all of `best`.
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
