"""The line that tells what runs, and how long is left."""

import asyncio
import re
import sys
from collections.abc import Mapping
from time import monotonic
from typing import TextIO

_EVERY = 1.0  # Seconds between two looks: often enough to read, too seldom to disturb.
_KEPT = 20  # Lines that are kept of what a suite says, for when it fails.


class Progress:
    """Shows one line for a run of suites.

    Args:
        planned: seconds that each suite is expected to take, in the order in which they run.
        screen: where the line goes; nothing is shown where that is no terminal, but for each suite's name.
    """

    def __init__(self, planned: Mapping[str, float], screen: TextIO = sys.stderr) -> None:
        self._planned = dict(planned)
        self._screen = screen
        self._done: dict[str, float] = {}
        self._name = ""
        self._began = 0.0

    def begin(self, name: str) -> None:
        """Hear that a suite begins."""
        self._name, self._began = name, monotonic()
        if not self._screen.isatty():
            print(self.line(0.0), file=self._screen, flush=True)

    def end(self) -> None:
        """Hear that the suite has ended."""
        self._done[self._name] = monotonic() - self._began
        self._show("")

    def line(self, gone: float, said: str = "") -> str:
        """Return the line for a suite that has been running for ``gone`` seconds and last said ``said``."""
        at, many = len(self._done) + 1, len(self._planned)
        return f"  {at} of {many}, {self._name}; {_clock(self.left(gone))} left{'; ' if said else ''}{said}"

    def left(self, gone: float) -> float:
        """Return the seconds until the end, as long as the rest takes as much longer than planned as the past did."""
        planned, taken = sum(self._planned[name] for name in self._done), sum(self._done.values())
        slower = taken / planned if planned else 1.0
        rest = sum(seconds for name, seconds in self._planned.items() if name not in self._done and name != self._name)
        return rest * slower + max(0.0, self._planned[self._name] * slower - gone)

    async def follow(self, process: asyncio.subprocess.Process) -> list[str]:
        """Show how a suite goes until it ends; return the last lines that it said."""
        stream = process.stderr
        if stream is None:
            raise RuntimeError("the suite has no standard error")
        said: list[str] = []
        reading = asyncio.create_task(stream.read(4096))
        while True:
            done, _ = await asyncio.wait([reading], timeout=_EVERY)
            if done:
                chunk = reading.result()
                if not chunk:
                    return said
                said = [*said, *_lines(chunk.decode(errors="replace"))][-_KEPT:]
                reading = asyncio.create_task(stream.read(4096))
                await asyncio.sleep(_EVERY / 5)
            self._show(self.line(monotonic() - self._began, said[-1] if said else ""))

    def _show(self, line: str) -> None:
        if self._screen.isatty():
            print(f"\r{line[:118]:118}" if line else "\r" + " " * 118 + "\r", end="", file=self._screen, flush=True)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
