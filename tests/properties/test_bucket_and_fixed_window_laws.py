from array import array
from math import inf
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.decisions.algorithm import ALGORITHMS
from resilience.decisions.fixed_window import bounds
from resilience.decisions.quota import Quota, Usage

SECOND = 1_000_000  # The models count in whole microseconds.
DAY = 86_400 * SECOND
MICROSECONDS = 3e-6  # More than the one that a wait is rounded up by, and than a float loses at 1.7e9 seconds.


class Ask(NamedTuple):
    now: float
    cost: int

    @property
    def instant(self) -> int:
        return round(self.now * SECOND)


class History(NamedTuple):
    quota: Quota
    asks: list[Ask]


windows = st.sampled_from([1000, 1001, SECOND, 60 * SECOND, DAY]) | st.integers(1000, 30 * DAY)
limits = st.integers(1, 20)
starts = st.sampled_from([0.0, 1e5 + 0.123456, 1.7e9 + 0.987654]) | st.floats(0, 2e9)


def bucket(limit: int, window: int, burst: int) -> Quota:
    return Quota(limit, window / SECOND, algorithm="token_bucket", burst=min(burst, limit))


buckets = st.builds(bucket, limits, windows, limits)
fixed = st.builds(lambda limit, window: Quota(limit, window / SECOND, algorithm="fixed_window"), limits, windows)
months = st.builds(lambda limit: Quota(limit, calendar="month"), limits)


@st.composite
def histories(draw: st.DrawFn, quotas: st.SearchStrategy[Quota]) -> History:
    quota = draw(quotas)
    window = round(quota.per * SECOND)
    unit = -(-window // quota.limit)
    marked = st.sampled_from([0, 0, 1, 2, unit - 1, unit, unit + 1, window // 7, window - 1, window, window + 1])
    steps = (marked | st.integers(0, 2 * window)).map(lambda us: us / SECOND) | st.floats(0, 2 * window / SECOND)
    costs = st.integers(0, quota.limit + 2) | st.sampled_from([1, 1, 1])
    history, now = History(quota, []), draw(starts)
    for step, cost in draw(st.lists(st.tuples(steps, costs), min_size=1, max_size=50)):
        now += step
        history.asks.append(Ask(now, cost))
    return history


def decide(state: "array[int]", quota: Quota, cost: int, now: float) -> Usage:
    return ALGORITHMS[quota.algorithm].decide(state, quota, cost, now)


def empty(quota: Quota) -> "array[int]":
    return ALGORITHMS[quota.algorithm].empty()


def take(state: "array[int]", quota: Quota, ask: Ask) -> Usage:
    usage = decide(state, quota, ask.cost, ask.now)
    if usage.allowed and ask.cost:
        ALGORITHMS[quota.algorithm].charge(state, quota, ask.cost, ask.now)
    return usage


many = settings(deadline=None, max_examples=150)
every = histories(buckets | fixed | months)


@many
@given(histories(buckets))
def test_a_bucket_is_drained_and_filled_as_buckets_are(history: History) -> None:
    state, quota = empty(history.quota), history.quota
    emission = -(-round(quota.per * SECOND) // quota.limit)
    burst = quota.capacity
    # The bucket itself, in microseconds' worth of units: full, drained by each unit, filled by each microsecond.
    level, at = burst * emission, history.asks[0].instant
    for ask in history.asks:
        level, at = min(burst * emission, level + ask.instant - at), ask.instant
        usage = take(state, quota, ask)
        assert usage.allowed == (ask.cost * emission <= level)
        if usage.allowed:
            level -= ask.cost * emission
        assert usage.limit == burst
        assert usage.remaining == level // emission


@many
@given(histories(buckets))
def test_no_span_of_time_holds_more_than_the_burst_and_its_share_of_the_rate(history: History) -> None:
    state, quota = empty(history.quota), history.quota
    admitted = [(ask.instant, ask.cost) for ask in history.asks if take(state, quota, ask).allowed]
    for first, (begin, _) in enumerate(admitted):
        for last in range(first, len(admitted)):
            span = admitted[last][0] - begin
            units = sum(cost for _, cost in admitted[first : last + 1])
            assert units <= quota.capacity + span * quota.limit / (quota.per * SECOND) + 1e-6


@many
@given(histories(fixed | months))
def test_a_fixed_window_counts_what_falls_into_it(history: History) -> None:
    state, quota = empty(history.quota), history.quota
    counts: dict[int, int] = {}
    for ask in history.asks:
        start, stop = bounds(quota, ask.instant)
        assert start <= ask.instant < stop
        used = counts.get(start, 0)
        usage = take(state, quota, ask)
        assert usage.allowed == (used + ask.cost <= quota.limit)
        if usage.allowed:
            counts[start] = used + ask.cost
        assert usage.remaining == quota.limit - counts.get(start, 0)


@many
@given(every)
def test_a_retry_after_the_wait_is_admitted_and_the_wait_is_no_longer_than_it_must(history: History) -> None:
    state, quota = empty(history.quota), history.quota
    for ask in history.asks:
        usage = take(state, quota, ask)
        if usage.allowed:
            assert usage.retry_after == 0
        elif ask.cost > quota.capacity:
            assert usage.retry_after == inf
        else:
            assert usage.retry_after > 0
            assert decide(state[:], quota, ask.cost, ask.now + usage.retry_after).allowed
            if usage.retry_after > MICROSECONDS:
                assert not decide(state[:], quota, ask.cost, ask.now + usage.retry_after - MICROSECONDS).allowed


@many
@given(every)
def test_a_denial_and_a_look_are_as_if_they_had_never_been(history: History) -> None:
    quota = history.quota
    asked, spared = empty(quota), empty(quota)
    for ask in history.asks:
        usage = take(asked, quota, ask)
        if usage.allowed and ask.cost:
            assert take(spared, quota, ask) == usage
    assert asked == spared


@many
@given(every)
def test_more_is_free_once_the_reset_is_over_and_not_before(history: History) -> None:
    state, quota = empty(history.quota), history.quota
    for ask in history.asks:
        usage = take(state, quota, ask)
        assert usage.reset_after >= 0
        if usage.remaining < quota.capacity:
            assert usage.reset_after > 0
        if usage.reset_after > MICROSECONDS:
            before = decide(state[:], quota, 0, ask.now + usage.reset_after - MICROSECONDS)
            assert before.remaining == usage.remaining
            after = decide(state[:], quota, 0, ask.now + usage.reset_after + MICROSECONDS)
            assert after.remaining > usage.remaining


@many
@given(every, st.floats(0, 10))
def test_an_expired_state_answers_as_a_fresh_one_and_not_before(history: History, later: float) -> None:
    state, quota = empty(history.quota), history.quota
    taken = sum(ask.cost for ask in history.asks if take(state, quota, ask).allowed)
    if not taken:
        assert state == empty(quota)
        return
    expires_at = ALGORITHMS[quota.algorithm].expires_at(state, quota)
    # A microsecond over, because a float of seconds rounds either way.
    now = expires_at + 1e-6 + later * quota.per
    for cost in range(quota.capacity + 2):
        assert decide(state[:], quota, cost, now) == decide(empty(quota), quota, cost, now)
    assert decide(state, quota, 0, expires_at - MICROSECONDS).remaining < quota.capacity
