"""Ground floor: the strict sliding window. Never more than ``limit`` units in any window, in O(1) memory.

Facts
- A window is cut into B parts. Units admitted in one part share one *mark*: the instant of the latest of them.
- A mark counts in full until a whole window has passed since its instant, so every unit is counted for at least
  one window: no window of that length, wherever it starts, ever holds more than the limit.
- Marks younger than one window lie in at most B + 1 parts, hence at most B + 1 marks, however high the limit.
- The price is a unit counted up to 1/B of a window too long. Up to B requests a window it is an exact log.
- A wait is at most one window and a microsecond, because a mark's instant is never ahead.

Time is counted in whole microseconds, so that every store decides alike.
"""

from array import array
from math import inf

from resilience.decisions.quota import Quota, Usage

PARTS = 30
"""B: how many parts a window is cut into."""

Marks = array
"""``array("q")``: the units counted, then pairs of (instant in microseconds, units), oldest first."""


def empty() -> "Marks[int]":
    """Return the state of a subject nobody has seen."""
    return array("q", (0,))


def decide(marks: "Marks[int]", quota: Quota, cost: int, now: float) -> Usage:
    """Tell what ``quota`` says to ``cost`` more units at ``now``. Drops marks that have passed, charges nothing.

    Args:
        cost: units asked for, at least 0; 0 only looks.
        now: seconds on the store's clock. A clock that steps back is read as standing still.
    """
    now_us, window_us = _instant(marks, now), round(quota.per * 1_000_000)
    while len(marks) > 1 and marks[1] + window_us <= now_us:
        marks[0] -= marks[2]
        del marks[1:3]
    used, limit = marks[0], quota.limit
    if used + cost <= limit:
        remaining = limit - used - cost
        oldest = marks[1] if len(marks) > 1 else now_us
        reset_after = (oldest + window_us - now_us) / 1_000_000 if remaining < limit else 0.0
        return Usage(True, limit, remaining, reset_after, 0.0)
    wait = _wait(marks, cost - (limit - used), window_us, now_us) if cost <= limit else inf
    reset_after = (marks[1] + window_us - now_us) / 1_000_000 if used else 0.0
    return Usage(False, limit, max(0, limit - used), reset_after, wait)


def charge(marks: "Marks[int]", quota: Quota, cost: int, now: float) -> None:
    """Count ``cost`` units at ``now``; ``decide`` has allowed them at the same instant."""
    if not cost:
        return
    now_us, part_us = _instant(marks, now), -(-round(quota.per * 1_000_000) // PARTS)
    if len(marks) > 1 and marks[-2] // part_us == now_us // part_us:
        marks[-2] = now_us
        marks[-1] += cost
    else:
        marks.extend((now_us, cost))
    marks[0] += cost


def expires_at(marks: "Marks[int]", quota: Quota) -> float:
    """Return the instant, in seconds, from which the state equals that of a subject nobody has seen."""
    return marks[-2] / 1_000_000 + quota.per if len(marks) > 1 else 0.0


def _instant(marks: "Marks[int]", now: float) -> int:
    now_us = round(now * 1_000_000)
    return max(now_us, marks[-2]) if len(marks) > 1 else now_us


def _wait(marks: "Marks[int]", surplus: int, window_us: int, now_us: int) -> float:
    """Return the seconds until the oldest marks that hold ``surplus`` units have passed."""
    index, freed = 1, marks[2]
    while freed < surplus:
        index += 2
        freed += marks[index + 1]
    # One microsecond more than exact: now + wait is a float sum, and must not round to just before the instant.
    return (marks[index] + window_us - now_us + 1) / 1_000_000
