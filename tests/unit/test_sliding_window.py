from array import array
from math import inf

import pytest

from resilience.decisions.quota import PARTS, Quota, Usage
from resilience.decisions.sliding_window import charge, decide, empty, expires_at, used_share

# A part of this window is exactly one second.
MINUTE = Quota(4, per=2 * PARTS)


def take(marks: "array[int]", quota: Quota, cost: int, now: float) -> Usage:
    usage = decide(marks, quota, cost, now)
    if usage.allowed and cost:
        charge(marks, quota, cost, now)
    return usage


def test_a_fresh_subject_has_the_whole_limit() -> None:
    assert decide(empty(), MINUTE, 0, 100.0) == Usage(True, 4, 4, 0.0, 0.0)


def test_a_request_takes_what_it_costs() -> None:
    marks = empty()
    assert take(marks, MINUTE, 3, 100.0) == Usage(True, 4, 1, 60.0, 0.0)
    assert take(marks, MINUTE, 1, 110.0) == Usage(True, 4, 0, 50.0, 0.0)


def test_the_request_over_the_limit_is_denied_and_told_when_to_retry() -> None:
    marks = empty()
    take(marks, MINUTE, 4, 100.0)
    assert decide(marks, MINUTE, 1, 130.0) == Usage(False, 4, 0, 30.0, 30.000001)


def test_a_wait_spans_as_many_marks_as_the_cost_needs() -> None:
    marks = empty()
    for at in (100.0, 110.0, 120.0, 130.0):
        take(marks, MINUTE, 1, at)
    waits = [decide(marks, MINUTE, cost, 140.0).retry_after for cost in (1, 2, 3, 4)]
    assert waits == [20.000001, 30.000001, 40.000001, 50.000001]


def test_a_wait_is_only_for_what_is_missing() -> None:
    marks = empty()
    take(marks, MINUTE, 1, 100.0)
    take(marks, MINUTE, 2, 110.0)
    assert decide(marks, MINUTE, 2, 120.0) == Usage(False, 4, 1, 40.0, 40.000001)


def test_a_wait_is_at_most_a_window_and_a_microsecond() -> None:
    marks = empty()
    take(marks, MINUTE, 4, 100.0)
    assert decide(marks, MINUTE, 1, 100.0).retry_after == 60.000001


def test_a_cost_over_the_limit_never_fits() -> None:
    marks = empty()
    assert decide(marks, MINUTE, 5, 100.0) == Usage(False, 4, 4, 0.0, inf)
    take(marks, MINUTE, 1, 100.0)
    assert decide(marks, MINUTE, 5, 110.0) == Usage(False, 4, 3, 50.0, inf)


def test_a_unit_is_counted_for_one_window_and_not_at_its_end() -> None:
    marks = empty()
    take(marks, MINUTE, 4, 100.0)
    assert not decide(marks, MINUTE, 1, 159.999999).allowed
    assert decide(marks, MINUTE, 4, 160.0) == Usage(True, 4, 0, 60.0, 0.0)


@pytest.mark.parametrize(("cost", "now"), [(0, 101.0), (1, 101.0), (5, 101.0), (0, 110.0), (1, 160.0), (4, 200.0)])
def test_a_decision_changes_nothing(cost: int, now: float) -> None:
    marks = empty()
    take(marks, MINUTE, 3, 100.0)
    take(marks, MINUTE, 1, 110.0)
    before = marks[:]
    decide(marks, MINUTE, cost, now)
    assert marks == before


def test_a_denial_charges_nothing() -> None:
    marks = empty()
    take(marks, MINUTE, 4, 100.0)
    assert not take(marks, MINUTE, 1, 101.0).allowed
    assert decide(marks, MINUTE, 4, 160.0).allowed


def test_looking_is_free() -> None:
    marks = empty()
    take(marks, MINUTE, 1, 100.0)
    before = marks[:]
    assert take(marks, MINUTE, 0, 110.0) == Usage(True, 4, 3, 50.0, 0.0)
    assert marks == before


def test_a_look_at_a_full_subject_is_allowed() -> None:
    marks = empty()
    take(marks, MINUTE, 4, 100.0)
    assert decide(marks, MINUTE, 0, 110.0) == Usage(True, 4, 0, 50.0, 0.0)


def test_units_of_one_part_count_from_the_latest() -> None:
    marks = empty()
    take(marks, MINUTE, 1, 100.0)
    take(marks, MINUTE, 1, 101.5)
    assert decide(marks, MINUTE, 0, 160.0).remaining == 2
    assert decide(marks, MINUTE, 0, 161.499999).remaining == 2
    assert decide(marks, MINUTE, 0, 161.5).remaining == 4


def test_units_of_two_parts_count_apart() -> None:
    marks = empty()
    take(marks, MINUTE, 1, 101.9)
    take(marks, MINUTE, 1, 102.0)
    assert decide(marks, MINUTE, 0, 161.9).remaining == 3


def test_the_state_stays_small_however_many_are_admitted() -> None:
    quota, marks, most = Quota(2**31 - 1, per=60), empty(), 0
    for step in range(3000):
        assert take(marks, quota, 1, step * 0.7).allowed
        most = max(most, len(marks) // 2)
    assert PARTS <= most <= PARTS + 1


def test_a_clock_that_steps_back_is_read_as_standing_still() -> None:
    marks = empty()
    take(marks, MINUTE, 3, 100.0)
    assert take(marks, MINUTE, 1, 40.0) == Usage(True, 4, 0, 60.0, 0.0)
    assert decide(marks, MINUTE, 1, 40.0).retry_after == 60.000001
    assert not decide(marks, MINUTE, 1, 159.9).allowed
    assert decide(marks, MINUTE, 4, 160.0).allowed


def test_the_state_expires_a_window_after_the_last_unit() -> None:
    marks = empty()
    assert expires_at(marks, MINUTE) == 0.0
    take(marks, MINUTE, 1, 100.0)
    take(marks, MINUTE, 1, 107.0)
    assert expires_at(marks, MINUTE) == 167.0
    assert decide(marks, MINUTE, 4, 167.0) == decide(empty(), MINUTE, 4, 167.0)


def test_a_log_counts_each_unit_from_its_own_microsecond() -> None:
    log, marks = Quota(4, per=60, algorithm="sliding_log"), empty()
    for at in (100.0, 100.5, 100.500001):
        take(marks, log, 1, at)
    assert [decide(marks, log, 0, at).remaining for at in (159.999999, 160.0, 160.5, 160.500001)] == [1, 2, 3, 4]


def test_the_used_share_is_of_the_limit() -> None:
    marks = empty()
    assert used_share(marks, MINUTE, 100.0) == 0.0
    take(marks, MINUTE, 1, 100.0)
    assert used_share(marks, MINUTE, 100.0) == 0.25
    take(marks, MINUTE, 3, 100.0)
    assert used_share(marks, MINUTE, 100.0) == 1.0


@pytest.mark.parametrize("now", [0.0, 1e5 + 0.1, 1.7e9 + 0.123457])
def test_a_retry_after_the_wait_is_admitted_at_any_size_of_clock(now: float) -> None:
    marks, quota = empty(), Quota(1, per=0.1)
    take(marks, quota, 1, now)
    wait = decide(marks, quota, 1, now).retry_after
    assert decide(marks, quota, 1, now + wait).allowed
