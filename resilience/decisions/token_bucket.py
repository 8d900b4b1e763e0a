"""Ground floor: the token bucket, as GCRA: a burst, and then a steady rate.

Facts
- The whole state is one instant: when the bucket will be full again.
- In any window it admits at most ``burst`` units and one more for each emission interval in it, so a burst of
  the limit admits up to twice the limit. That is why the burst is always explicit.
- The emission interval is rounded up to whole microseconds: at 10,000 a second it may run 1 % slow, at 100,000, the
  most there is, 10 %; never fast.

Source: ITU-T I.371, "Generic Cell Rate Algorithm", the virtual scheduling form.
"""

from array import array
from math import inf

from resilience.decisions.quota import Quota, Usage


def empty() -> "array[int]":
    """Return the state of a subject nobody has seen: full since ever."""
    return array("q", (0,))


def decide(full: "array[int]", quota: Quota, cost: int, now: float) -> Usage:
    """Tell what ``quota`` says to ``cost`` more units at ``now``; charges nothing. See ``sliding_window.decide``."""
    now_us, step, burst = round(now * 1_000_000), quota.step_us, quota.capacity
    missing = max(0, full[0] - now_us)
    left = max(0, (burst * step - missing) // step)
    if cost <= left:
        missing += cost * step
        left -= cost
        return Usage(True, burst, left, _until_more(missing, left, quota), 0.0)
    # One microsecond more than exact, as in sliding_window.
    wait = (missing + (cost - burst) * step + 1) / 1_000_000 if cost <= burst else inf
    return Usage(False, burst, left, _until_more(missing, left, quota), wait)


def charge(full: "array[int]", quota: Quota, cost: int, now: float) -> None:
    """Count ``cost`` units, at least 1, at ``now``; ``decide`` has allowed them at the same instant."""
    full[0] = max(full[0], round(now * 1_000_000)) + cost * quota.step_us


def expires_at(full: "array[int]", _quota: Quota) -> float:
    """Return the instant, in seconds, from which the state equals that of a subject nobody has seen."""
    return full[0] / 1_000_000


def used_share(full: "array[int]", quota: Quota, now: float) -> float:
    """Return how much of the quota is used, 0 to 1."""
    return max(0.0, full[0] / 1_000_000 - now) * 1_000_000 / (quota.capacity * quota.step_us)


def _until_more(missing: int, left: int, quota: Quota) -> float:
    return (missing - (quota.capacity - left - 1) * quota.step_us) / 1_000_000 if missing else 0.0
