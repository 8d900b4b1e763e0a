"""Ground floor: the algorithms by name. Each is the same few functions over a state of its own."""

from array import array
from collections.abc import Callable
from typing import NamedTuple

from resilience.decisions import fixed_window, sliding_window, token_bucket
from resilience.decisions.quota import Algorithm, Quota, Usage

State = array


class Functions(NamedTuple):
    """One algorithm: an empty state, a look at it, a charge, both in one, its end of life, and how much is used."""

    empty: Callable[[], "State[int]"]
    decide: Callable[["State[int]", Quota, int, float], Usage]
    charge: Callable[["State[int]", Quota, int, float], None]
    take: Callable[["State[int]", Quota, int, float], Usage]
    expires_at: Callable[["State[int]", Quota], float]
    used_share: Callable[["State[int]", Quota, float], float]


def _both(
    decide: Callable[["State[int]", Quota, int, float], Usage],
    charge: Callable[["State[int]", Quota, int, float], None],
) -> Callable[["State[int]", Quota, int, float], Usage]:
    def take(state: "State[int]", quota: Quota, cost: int, now: float) -> Usage:
        usage = decide(state, quota, cost, now)
        if usage.allowed:
            charge(state, quota, cost, now)
        return usage

    return take


_SLIDING = Functions(
    sliding_window.empty,
    sliding_window.decide,
    sliding_window.charge,
    sliding_window.take,
    sliding_window.expires_at,
    sliding_window.used_share,
)

# Concurrency is not among them: its state is a set of holders, who have names (see ``concurrency``).
ALGORITHMS: dict[Algorithm, Functions] = {
    "sliding_window": _SLIDING,
    "sliding_log": _SLIDING,
    "token_bucket": Functions(
        token_bucket.empty,
        token_bucket.decide,
        token_bucket.charge,
        _both(token_bucket.decide, token_bucket.charge),
        token_bucket.expires_at,
        token_bucket.used_share,
    ),
    "fixed_window": Functions(
        fixed_window.empty,
        fixed_window.decide,
        fixed_window.charge,
        _both(fixed_window.decide, fixed_window.charge),
        fixed_window.expires_at,
        fixed_window.used_share,
    ),
}
