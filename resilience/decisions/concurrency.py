"""Ground floor: the concurrency limit: so many at once. A permit is held until it is given back, or its lease is out.

The lease is what frees the permits of a worker that died: holders renew theirs while they run.
"""

from math import inf

from resilience.decisions.quota import Quota, Usage

Permits = dict[str, int]
"""From a holder's token to the instant, in microseconds, at which its lease is out."""


def decide(permits: Permits, quota: Quota, token: str, cost: int, now: float) -> Usage:
    """Tell what ``quota`` says to one more holder at ``now``; changes nothing.

    A holder that asks again is granted again: that is how it renews.

    Args:
        token: the holder's own.
        cost: 1, or 0 to look.
        now: seconds on the store's clock.
    """
    now_us = round(now * 1_000_000)
    others = [ends for holder, ends in permits.items() if ends > now_us and holder != token]
    left = max(0, quota.limit - len(others))
    first = min(others, default=now_us + quota.window_us if cost else now_us)
    until = (first - now_us) / 1_000_000
    if cost <= left:
        return Usage(True, quota.limit, left - cost, until, 0.0)
    # One microsecond more than exact, as in sliding_window; the permit may well be given back before.
    return Usage(False, quota.limit, left, until, (first - now_us + 1) / 1_000_000 if others else inf)


def charge(permits: Permits, quota: Quota, token: str, now: float) -> None:
    """Give ``token`` a permit from ``now`` for one lease; forget those whose lease is out."""
    now_us = round(now * 1_000_000)
    for holder in [holder for holder, ends in permits.items() if ends <= now_us]:
        del permits[holder]
    permits[token] = now_us + quota.window_us
