"""Where CPU time goes, by function: looks at what runs, a thousand times a second."""

import gc
import signal
from time import process_time
from types import FrameType
from typing import NamedTuple, Self

_EVERY = 0.001


class Place(NamedTuple):
    """A function."""

    module: str
    function: str


COLLECTOR = Place("garbage collection", "")


class Sampler:
    """Counts the CPU seconds of this process's main thread by the innermost Python function, while it is entered.

    Each look is worth the CPU time since the one before, so that waiting counts nothing. What a C function takes is
    counted for its caller, and what the garbage collector takes for ``COLLECTOR``. One at a time: it owns ``SIGALRM``.
    """

    def __init__(self) -> None:
        self.seconds: dict[Place, float] = {}
        self._last = self._due = 0.0
        self._collecting = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._look)
        gc.callbacks.append(self._collect)
        self._last = process_time()
        signal.setitimer(signal.ITIMER_REAL, _EVERY, _EVERY)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        gc.callbacks.remove(self._collect)

    def _look(self, _number: int, frame: FrameType | None) -> None:
        now = process_time()
        if self._collecting:
            self._count(COLLECTOR, now)
        elif frame is not None:
            self._count(Place(frame.f_globals.get("__name__", "?"), frame.f_code.co_qualname), now)

    def _collect(self, phase: str, _info: dict[str, int]) -> None:
        # A collection runs no Python, so a look that is due in it comes late: what it took is counted here.
        now = process_time()
        self._collecting = phase == "start"
        if self._collecting:
            self._last, self._due = now, now - self._last
        else:
            self._count(COLLECTOR, now)
            self._last = now - self._due  # what had run before the collection is still to be counted

    def _count(self, place: Place, now: float) -> None:
        self.seconds[place] = self.seconds.get(place, 0.0) + now - self._last
        self._last = now
