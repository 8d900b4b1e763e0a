"""Who blocks the event loop: a thread that listens to its heartbeat, and looks where it stands when one is late."""

import asyncio
import logging
import sys
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from queue import Empty, SimpleQueue
from time import monotonic
from traceback import StackSummary, extract_stack
from typing import Self

from resilience.decisions.readiness import ComponentHealth, HealthStatus
from resilience.errors import ConfigurationError

logger = logging.getLogger("resilience")

_STDLIB = sysconfig.get_path("stdlib")
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(slots=True)
class _Block:
    """One time that the loop stood still: where, since when, and until when if it goes on."""

    where: str
    since: float
    until: float | None = None


class EventLoopLag:
    """A check that is degraded for a while after something blocked the event loop, and names the line.

    A daemon thread asks the loop for a sign of life ``1 / interval`` times a second. Where none comes for ``threshold``
    seconds it notes the innermost line of the application that the loop's thread stands in, and logs the traceback,
    once for each block. What is told is at least as long as the threshold and at most ``interval`` shorter than the
    block was.

    Enter it, or ``start`` it, on the loop that is watched; nothing runs before. A process that was forked from one that
    watched must start it again. The answer is as late as the loop is, so let it be uncritical: restarting a process
    for a block that is over helps nobody.

    Args:
        threshold: seconds without a sign of life that count as a block, > 0.
        interval: seconds between two signs of life, > 0.
        remember: seconds that a block is told after its end, at least 0.
        clock: seconds that never step back.

    Raises:
        ConfigurationError: a number is out of range.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        *,
        interval: float = 0.25,
        remember: float = 60.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if not (threshold > 0 and interval > 0 and remember >= 0):
            raise ConfigurationError("threshold and interval are seconds above 0, and remember is at least 0.")
        self._threshold = threshold
        self._interval = interval
        self._remember = remember
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._signs: SimpleQueue[bool] = SimpleQueue()
        self._block: _Block | None = None
        self._late = 0.0

    def start(self) -> None:
        """Watch the running loop from now on, and no other."""
        self.stop()
        loop, watched, signs = asyncio.get_running_loop(), threading.get_ident(), SimpleQueue[bool]()
        self._signs, self._block = signs, None
        self._thread = threading.Thread(
            target=self._watch, args=(loop, watched, signs), name="resilience-loop-lag", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        if self._thread is not None:
            self._signs.put(False)
            self._thread.join(self._threshold)
            self._thread = None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    async def __call__(self) -> ComponentHealth:
        """Tell the last block, if it is not long ago; ``latency_ms`` is how late the last sign of life was."""
        status, message = HealthStatus.HEALTHY, "On time"
        block = self._block
        if self._thread is None or not self._thread.is_alive():
            status, message = HealthStatus.DEGRADED, "Not watched"
        elif block is not None:
            now = self._clock()
            until = now if block.until is None else block.until
            if now - until < self._remember:
                status, message = HealthStatus.DEGRADED, f"Blocked for {until - block.since:.1f} s in {block.where}"
        return ComponentHealth("event_loop", status, self._late * 1000, message)

    def _beat(self, asked_at: float, signs: "SimpleQueue[bool]") -> None:
        """Give a sign of life; on the loop."""
        now = self._clock()
        self._late = now - asked_at
        block = self._block
        if block is not None and block.until is None:
            block.until = now
        signs.put(True)

    def _watch(self, loop: asyncio.AbstractEventLoop, watched: int, signs: "SimpleQueue[bool]") -> None:
        while _came(signs, self._interval) is None:  # between two signs only the end can come
            asked_at = self._clock()
            try:
                loop.call_soon_threadsafe(self._beat, asked_at, signs)
            except RuntimeError:
                return  # the loop is closed
            alive = _came(signs, self._threshold)
            if alive is None:
                self._look(watched, asked_at, signs)
                while alive is None and not loop.is_closed():
                    alive = _came(signs, self._threshold)
            if not alive:
                return

    def _look(self, watched: int, since: float, signs: "SimpleQueue[bool]") -> None:
        frame = sys._current_frames().get(watched)  # noqa: SLF001 - the documented way to another thread's stack
        stack = extract_stack(frame)
        del frame  # it holds the locals of whoever is at fault
        if not signs.empty():
            return  # the sign came in this moment: who stands there now did nothing
        where = _place(stack)
        self._block = _Block(where, since)
        logger.warning(
            "The event loop has stood still for %.1f s in %s\n%s", self._threshold, where, "".join(stack.format())
        )


def _came(signs: "SimpleQueue[bool]", timeout: float) -> bool | None:
    try:
        return signs.get(timeout=timeout)
    except Empty:
        return None


def _place(stack: StackSummary) -> str:
    """Name the innermost line of the application; where there is none, of a library, and else of Python's own."""
    # Outside of the loop is who runs it, and blocks nothing by doing so.
    loops = [index for index, frame in enumerate(stack) if _is_loop(frame.filename)]
    inside = stack[loops[-1] + 1 :] if loops else stack[:]
    if all(PurePath(frame.filename).name == "selectors.py" for frame in inside):
        return "no code: the process got no time to run"
    found = inside[-1]
    for wanted in (_is_own, _is_foreign):
        match = next((frame for frame in reversed(inside) if wanted(frame.filename)), None)
        if match is not None:
            found = match
            break
    return f"{PurePath(found.filename).name}:{found.lineno} {found.name}"


def _is_loop(file: str) -> bool:
    path = PurePath(file)
    return path.parent.name == "asyncio" and path.name in ("base_events.py", "events.py", "runners.py")


def _is_foreign(file: str) -> bool:
    return not _INSTALLED.isdisjoint(PurePath(file).parts)


def _is_own(file: str) -> bool:
    return not (_is_foreign(file) or file.startswith("<") or PurePath(file).is_relative_to(_STDLIB))
