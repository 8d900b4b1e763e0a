"""Floor 1: what ``lua/acquire.lua`` is told of a rule."""

from time import time

from resilience.decisions import fixed_window
from resilience.decisions.quota import Algorithm, Quota
from resilience.stores.base import Want

LETTERS: dict[Algorithm, str] = {
    "sliding_window": "S",
    "sliding_log": "S",
    "token_bucket": "B",
    "fixed_window": "F",
    "concurrency": "C",
}
"""The script's name of each algorithm; also what a count's key says, so that no two ever read one another's state."""


def rule_arguments(want: Want) -> tuple[str | int, ...]:
    """Return the six arguments that the script reads for one rule."""
    quota = want.quota
    step: str | int = quota.step_us if quota.calendar is None else _starts(quota)
    if quota.algorithm == "concurrency":
        step = holder(want)
    letter = LETTERS[quota.algorithm]
    return letter, quota.limit, quota.window_us, want.cost, quota.capacity, step


def holder(want: Want) -> str:
    """Return the member of a concurrency limit's set that a call is."""
    return f"t{want.token}"


def _starts(quota: Quota) -> str:
    """Return the starts of the windows around now, for a server whose clock is not ours."""
    first, second = fixed_window.bounds(quota, round(time() * 1_000_000))
    third = fixed_window.bounds(quota, second)[1]
    before = fixed_window.bounds(quota, first - 1)[0]
    return f"{before},{first},{second},{third}"
