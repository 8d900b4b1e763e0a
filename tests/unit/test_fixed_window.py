from array import array
from datetime import UTC, datetime
from math import inf

import pytest

from resilience.decisions.fixed_window import bounds, charge, decide, empty, expires_at, used_share
from resilience.decisions.quota import Quota, Usage

MINUTE = Quota(4, per=60, algorithm="fixed_window")
DAY = Quota(4, calendar="day")
MONTH = Quota(4, calendar="month")


def take(state: "array[int]", quota: Quota, cost: int, now: float) -> Usage:
    usage = decide(state, quota, cost, now)
    if usage.allowed and cost:
        charge(state, quota, cost, now)
    return usage


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def test_a_fresh_subject_has_the_whole_limit() -> None:
    assert decide(empty(), MINUTE, 0, 130.0) == Usage(True, 4, 4, 0.0, 0.0)


def test_a_request_takes_what_it_costs_until_the_window_ends() -> None:
    state = empty()
    assert take(state, MINUTE, 3, 130.0) == Usage(True, 4, 1, 50.0, 0.0)
    assert take(state, MINUTE, 0, 140.0) == Usage(True, 4, 1, 40.0, 0.0)
    assert take(state, MINUTE, 2, 150.0) == Usage(False, 4, 1, 30.0, 30.000001)
    assert take(state, MINUTE, 1, 179.0) == Usage(True, 4, 0, 1.0, 0.0)
    assert take(state, MINUTE, 4, 180.0) == Usage(True, 4, 0, 60.0, 0.0)


def test_a_window_starts_at_a_multiple_of_its_length() -> None:
    state = empty()
    assert take(state, MINUTE, 4, 119.999999).allowed
    assert take(state, MINUTE, 4, 120.0).allowed
    assert not take(state, MINUTE, 1, 179.999999).allowed


def test_a_denial_charges_nothing() -> None:
    state = empty()
    take(state, MINUTE, 4, 130.0)
    before = state[:]
    assert not take(state, MINUTE, 1, 131.0).allowed
    assert state == before


def test_a_cost_over_the_limit_never_fits() -> None:
    assert decide(empty(), MINUTE, 5, 130.0) == Usage(False, 4, 4, 0.0, inf)


def test_a_clock_that_steps_back_frees_nothing() -> None:
    state = empty()
    take(state, MINUTE, 3, 130.0)
    assert not decide(state, MINUTE, 2, 110.0).allowed
    assert take(state, MINUTE, 1, 110.0).allowed
    assert not decide(state, MINUTE, 1, 130.0).allowed


def test_a_wait_after_a_step_back_reaches_the_next_window() -> None:
    state = empty()
    take(state, MINUTE, 4, 130.0)
    wait = decide(state, MINUTE, 1, 110.0).retry_after
    assert decide(state, MINUTE, 1, 110.0 + wait).allowed


def test_the_state_expires_with_its_window() -> None:
    state = empty()
    take(state, MINUTE, 4, 130.0)
    assert expires_at(state, MINUTE) == 180.0
    assert used_share(state, MINUTE, 130.0) == 1.0
    assert used_share(empty(), MINUTE, 130.0) == 0.0


@pytest.mark.parametrize(
    ("quota", "now", "start", "stop"),
    [
        (DAY, "2026-02-28T23:59:59.999999", "2026-02-28", "2026-03-01"),
        (DAY, "2026-03-01T00:00:00", "2026-03-01", "2026-03-02"),
        (MONTH, "2026-01-31T12:00:00", "2026-01-01", "2026-02-01"),
        (MONTH, "2026-02-28T23:59:59.999999", "2026-02-01", "2026-03-01"),
        (MONTH, "2024-02-29T00:00:00", "2024-02-01", "2024-03-01"),
        (MONTH, "2026-12-31T23:59:59.999999", "2026-12-01", "2027-01-01"),
        (MONTH, "2027-01-01T00:00:00", "2027-01-01", "2027-02-01"),
        (MONTH, "1970-01-01T00:00:00", "1970-01-01", "1970-02-01"),
    ],
)
def test_a_calendar_window_starts_and_ends_with_the_calendars_in_utc(
    quota: Quota, now: str, start: str, stop: str
) -> None:
    found = bounds(quota, round(at(now) * 1_000_000))
    assert found == (round(at(start) * 1_000_000), round(at(stop) * 1_000_000))


def test_a_monthly_quota_is_whole_again_in_the_next_month() -> None:
    state = empty()
    assert take(state, MONTH, 4, at("2026-02-01T00:00:00")) == Usage(True, 4, 0, 28 * 86400.0, 0.0)
    assert not take(state, MONTH, 1, at("2026-02-28T23:59:59")).allowed
    assert take(state, MONTH, 4, at("2026-03-01T00:00:00")) == Usage(True, 4, 0, 31 * 86400.0, 0.0)
    assert expires_at(state, MONTH) == at("2026-04-01T00:00:00")
