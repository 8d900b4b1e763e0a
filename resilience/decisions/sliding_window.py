"""Ground floor: the strict sliding window. Never more than ``limit`` units in any window, in O(1) memory.

Facts
- A window is cut into B parts. Units admitted in one part share one *mark*: the instant of the latest of them.
- A mark counts in full until a whole window has passed since its instant, so every unit is counted for at least
  one window: no window of that length, wherever it starts, ever holds more than the limit.
- Marks younger than one window lie in at most B + 1 parts, hence at most B + 1 marks, however high the limit.
- The price is a unit counted up to 1/B of a window too long. Requests a part or more from each other count exactly.
- A wait is at most one window and a microsecond, because a mark's instant is never ahead.
- ``sliding_log`` is the same with parts of a microsecond: exact, and as many marks as requests.

Time is counted in whole microseconds, so that every store decides alike.
"""

from array import array
from math import inf

from resilience.decisions.quota import Quota, Usage

_made = tuple.__new__  # half the time of calling a named tuple's class

Marks = array
"""``array("q")``: the units counted, then pairs of (instant in microseconds, units), oldest first."""


def empty() -> "Marks[int]":
    """Return the state of a subject nobody has seen."""
    return array("q", (0,))


def decide(marks: "Marks[int]", quota: Quota, cost: int, now: float) -> Usage:
    """Tell what ``quota`` says to ``cost`` more units at ``now``. Changes nothing.

    Args:
        cost: units asked for, at least 0; 0 only looks.
        now: seconds on the store's clock. One that steps back behind the last mark is read as standing still there.
    """
    now_us, window_us, limit = _instant(marks, now), quota.window_us, quota.limit
    first, used = _live(marks, now_us - window_us)
    oldest = marks[first] if used else now_us
    if not cost or used + cost <= limit:
        if cost and first + 2 == len(marks) and oldest // quota.step_us == now_us // quota.step_us:
            oldest = now_us  # the charge will move the only mark
        reset_after = (oldest + window_us - now_us) / 1_000_000 if used or cost else 0.0
        return Usage(True, limit, max(0, limit - used - cost), reset_after, 0.0)
    reset_after = (oldest + window_us - now_us) / 1_000_000 if used else 0.0
    left = max(0, limit - used)  # more than the limit is used where it was lowered meanwhile
    if cost > limit:
        return Usage(False, limit, left, reset_after, inf)
    freed, last = marks[first + 1], first
    while freed < used + cost - limit:
        last += 2
        freed += marks[last + 1]
    # One microsecond more than exact: now + wait is a float sum, and must not round to just before the instant.
    return Usage(False, limit, left, reset_after, (marks[last] + window_us - now_us + 1) / 1_000_000)


def charge(marks: "Marks[int]", quota: Quota, cost: int, now: float) -> None:
    """Count ``cost`` units, at least 1, at ``now``; ``decide`` has allowed them at the same instant."""
    now_us = _instant(marks, now)
    first, used = _live(marks, now_us - quota.window_us)
    _count(marks, quota, first, used + cost, cost, now_us)


def take(marks: "Marks[int]", quota: Quota, cost: int, now: float) -> Usage:
    """Say what ``decide`` says to ``cost`` units, at least 1, and count them where they fit: one look for both."""
    now_us, window_us, limit = _instant(marks, now), quota.window_us, quota.limit
    first, used = _live(marks, now_us - window_us)
    used += cost
    if used > limit:
        return decide(marks, quota, cost, now)
    _count(marks, quota, first, used, cost, now_us)
    return _made(Usage, (True, limit, limit - used, (marks[1] + window_us - now_us) / 1_000_000, 0.0))


def expires_at(marks: "Marks[int]", quota: Quota) -> float:
    """Return the instant, in seconds, from which the state equals that of a subject nobody has seen."""
    return marks[-2] / 1_000_000 + quota.per if len(marks) > 1 else 0.0


def used_share(marks: "Marks[int]", quota: Quota, _now: float) -> float:
    """Return how much of the quota is used, 0 to 1, as of the last charge."""
    return marks[0] / quota.limit


def _count(marks: "Marks[int]", quota: Quota, first: int, used: int, cost: int, now_us: int) -> None:
    if first > 1:
        del marks[1:first]
    step_us = quota.step_us
    if len(marks) > 1 and marks[-2] // step_us == now_us // step_us:
        marks[-2] = now_us
        marks[-1] += cost
    else:
        marks.extend((now_us, cost))
    marks[0] = used


def _instant(marks: "Marks[int]", now: float) -> int:
    now_us = round(now * 1_000_000)
    return marks[-2] if len(marks) > 1 and marks[-2] > now_us else now_us


def _live(marks: "Marks[int]", passed_us: int) -> tuple[int, int]:
    """Return where the first mark after ``passed_us`` is, and how many units it and the later ones hold."""
    first, used = 1, marks[0]
    while first < len(marks) and marks[first] <= passed_us:
        used -= marks[first + 1]
        first += 2
    return first, used
