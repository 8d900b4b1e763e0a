"""Public: a clock that goes when it is told to."""


class ManualClock:
    """Seconds that only move when a test moves them. Call it to read it.

    Args:
        start: the first reading, in seconds.
    """

    def __init__(self, start: float = 1000.0) -> None:
        self.now = start

    def __call__(self) -> float:
        """Return the reading."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move on; a negative number steps back, as a badly kept clock does."""
        self.now += seconds
