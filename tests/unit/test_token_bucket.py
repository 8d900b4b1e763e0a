from array import array
from math import inf

from resilience.decisions.quota import Quota, Usage
from resilience.decisions.token_bucket import charge, decide, empty, expires_at, used_share

BUCKET = Quota(60, per=60, algorithm="token_bucket", burst=3)  # one unit a second


def take(full: "array[int]", quota: Quota, cost: int, now: float) -> Usage:
    usage = decide(full, quota, cost, now)
    if usage.allowed and cost:
        charge(full, quota, cost, now)
    return usage


def test_a_fresh_bucket_is_full() -> None:
    assert decide(empty(), BUCKET, 0, 100.0) == Usage(True, 3, 3, 0.0, 0.0)


def test_a_burst_is_admitted_at_once_and_then_a_steady_rate() -> None:
    full = empty()
    assert take(full, BUCKET, 2, 100.0) == Usage(True, 3, 1, 1.0, 0.0)
    assert take(full, BUCKET, 1, 100.0) == Usage(True, 3, 0, 1.0, 0.0)
    assert take(full, BUCKET, 1, 100.25) == Usage(False, 3, 0, 0.75, 0.750001)
    assert take(full, BUCKET, 1, 101.0) == Usage(True, 3, 0, 1.0, 0.0)
    assert not take(full, BUCKET, 1, 101.999999).allowed
    assert take(full, BUCKET, 1, 102.0).allowed


def test_a_wait_is_for_all_the_units_that_are_missing() -> None:
    full = empty()
    take(full, BUCKET, 3, 100.0)
    assert [decide(full, BUCKET, cost, 100.5).retry_after for cost in (1, 2, 3)] == [0.500001, 1.500001, 2.500001]
    assert decide(full, BUCKET, 3, 102.5) == Usage(False, 3, 2, 0.5, 0.500001)


def test_an_idle_bucket_saves_up_no_more_than_its_burst() -> None:
    full = empty()
    take(full, BUCKET, 3, 100.0)
    assert decide(full, BUCKET, 0, 1_000_000.0).remaining == 3
    assert not decide(full, BUCKET, 4, 1_000_000.0).allowed


def test_a_cost_over_the_burst_never_fits() -> None:
    assert decide(empty(), BUCKET, 4, 100.0) == Usage(False, 3, 3, 0.0, inf)


def test_a_denial_charges_nothing() -> None:
    full = empty()
    take(full, BUCKET, 3, 100.0)
    before = full[:]
    assert not take(full, BUCKET, 1, 100.5).allowed
    assert full == before


def test_a_clock_that_steps_back_frees_nothing() -> None:
    full = empty()
    take(full, BUCKET, 3, 100.0)
    assert decide(full, BUCKET, 0, 50.0).remaining == 0
    assert not take(full, BUCKET, 1, 50.0).allowed
    assert decide(full, BUCKET, 0, 101.0).remaining == 1


def test_the_rate_may_run_slow_and_never_fast() -> None:
    thirds, full = Quota(3, per=0.1, algorithm="token_bucket", burst=1), empty()
    take(full, thirds, 1, 100.0)
    assert not decide(full, thirds, 1, 100.033333).allowed
    assert decide(full, thirds, 1, 100.033334).allowed


def test_the_state_expires_when_the_bucket_is_full_again() -> None:
    full = empty()
    take(full, BUCKET, 3, 100.0)
    assert expires_at(full, BUCKET) == 103.0
    assert decide(full, BUCKET, 3, 103.0) == decide(empty(), BUCKET, 3, 103.0)


def test_the_used_share_is_of_the_burst_and_falls_with_time() -> None:
    full = empty()
    assert used_share(full, BUCKET, 100.0) == 0.0
    take(full, BUCKET, 3, 100.0)
    assert used_share(full, BUCKET, 100.0) == 1.0
    assert used_share(full, BUCKET, 101.5) == 0.5
    assert used_share(full, BUCKET, 200.0) == 0.0
