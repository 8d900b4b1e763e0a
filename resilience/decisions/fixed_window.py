"""Ground floor: the fixed window: a count that starts anew at each multiple of the window, or with the calendar's.

It admits up to twice the limit around such an instant. What it is for is a quota that people read in a contract:
so many a day, so many a month.
"""

from array import array
from datetime import UTC, datetime
from math import inf

from resilience.decisions.quota import Quota, Usage

_DAY = 86_400_000_000


def empty() -> "array[int]":
    """Return the state of a subject nobody has seen: the window's first instant in microseconds, and units."""
    return array("q", (0, 0))


def bounds(quota: Quota, now_us: int) -> tuple[int, int]:
    """Return the first instant of the window that ``now_us`` is in, and of the next; in microseconds, UTC."""
    if quota.calendar != "month":
        start = now_us // quota.window_us * quota.window_us
        return start, start + quota.window_us
    day = datetime.fromtimestamp(now_us // 1_000_000, UTC).date().replace(day=1)
    following = day.replace(year=day.year + day.month // 12, month=day.month % 12 + 1)
    epoch = datetime.fromtimestamp(0, UTC).date()
    return (day - epoch).days * _DAY, (following - epoch).days * _DAY


def decide(state: "array[int]", quota: Quota, cost: int, now: float) -> Usage:
    """Tell what ``quota`` says to ``cost`` more units at ``now``; charges nothing. See ``sliding_window.decide``."""
    now_us = round(now * 1_000_000)
    start, stop = bounds(quota, now_us)
    if state[0] > start:
        start, stop = bounds(quota, state[0])  # the clock stepped back
    used, limit = state[1] if state[0] >= start else 0, quota.limit
    until_stop = (stop - now_us) / 1_000_000
    left = max(0, limit - used)  # more than the limit is used where it was lowered meanwhile
    if cost <= left:
        return Usage(True, limit, left - cost, until_stop if used or cost else 0.0, 0.0)
    # One microsecond more than exact, as in sliding_window.
    wait = (stop - now_us + 1) / 1_000_000 if cost <= limit else inf
    return Usage(False, limit, left, until_stop if used else 0.0, wait)


def charge(state: "array[int]", quota: Quota, cost: int, now: float) -> None:
    """Count ``cost`` units, at least 1, at ``now``; ``decide`` has allowed them at the same instant."""
    start, _ = bounds(quota, round(now * 1_000_000))
    if start > state[0]:
        state[0], state[1] = start, 0
    state[1] += cost


def expires_at(state: "array[int]", quota: Quota) -> float:
    """Return the instant, in seconds, from which the state equals that of a subject nobody has seen."""
    return bounds(quota, state[0])[1] / 1_000_000


def used_share(state: "array[int]", quota: Quota, _now: float) -> float:
    """Return how much of the quota is used, 0 to 1, as of the last charge."""
    return state[1] / quota.limit
