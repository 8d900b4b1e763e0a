from array import array
from collections.abc import Coroutine, Sequence
from copy import deepcopy
from math import inf
from typing import Any, NamedTuple, TypeVar

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from resilience.decisions.quota import PARTS, Algorithm, Quota, Usage
from resilience.decisions.sliding_window import charge, decide, empty, expires_at
from resilience.stores.base import Want
from resilience.stores.memory import MemoryStore
from resilience.testing import ManualClock

T = TypeVar("T")
SECOND = 1_000_000  # The model counts in whole microseconds, as the docstring says the limiter does.
DAY = 86_400 * SECOND
MICROSECONDS = 3e-6  # More than the one that a wait is rounded up by, and than a float loses at 1.7e9 seconds.


class Ask(NamedTuple):
    now: float
    cost: int


class History(NamedTuple):
    quota: Quota
    asks: list[Ask]

    @property
    def window(self) -> int:
        return round(self.quota.per * SECOND)

    @property
    def part(self) -> int:
        return 1 if self.quota.algorithm == "sliding_log" else -(-self.window // PARTS)


class ExactLog:
    """Keeps every admitted (instant, cost) for ever, and counts by looking at all of them."""

    def __init__(self) -> None:
        self.admitted: list[tuple[int, int]] = []

    def instant(self, now: float) -> int:
        latest = self.admitted[-1][0] if self.admitted else -(2**62)
        return max(round(now * SECOND), latest)

    def used(self, instant: int, window: int) -> int:
        return sum(cost for at, cost in self.admitted if instant - window < at <= instant)

    def admit(self, now: float, cost: int) -> None:
        self.admitted.append((self.instant(now), cost))

    def most_in_a_window(self, window: int) -> int:
        return max((self.used(at, window) for at, _ in self.admitted), default=0)


ALGORITHMS: tuple[Algorithm, ...] = ("sliding_window", "sliding_window", "sliding_log")


def quotas(highest: int, *algorithms: Algorithm) -> st.SearchStrategy[Quota]:
    windows = st.sampled_from([1000, 1001, 29_999, SECOND // 10, SECOND, 60 * SECOND, DAY, 30 * DAY])
    return st.builds(
        lambda limit, window, algorithm: Quota(limit, window / SECOND, algorithm=algorithm),
        st.integers(1, highest),
        windows | st.integers(1000, 1_000_000) | st.integers(1000, 30 * DAY),
        st.sampled_from(algorithms or ALGORITHMS),
    )


starts = st.sampled_from([0.0, 1000.0, 1e5 + 0.123456, 1.7e9 + 0.987654]) | st.floats(0, 2e9)


def steps(window: int, *, back: bool) -> st.SearchStrategy[float]:
    part = -(-window // PARTS)
    tiny = st.sampled_from([0, 0, 0, 1, 2, 3])
    marked = st.sampled_from([part - 1, part, part + 1, window // 45, window // 7, window // 2])
    whole = st.sampled_from([window - part, window - 1, window, window + 1, window + part])
    whole_microseconds = tiny | marked | whole | st.integers(0, 2 * window)
    forward = whole_microseconds.map(lambda us: us / SECOND) | st.floats(0, 2 * window / SECOND)
    if not back:
        return forward
    return forward | st.sampled_from([1, part, window // 2, window - 1, window]).map(lambda us: -us / SECOND)


@st.composite
def histories(draw: st.DrawFn, *, back: bool = False, spaced: bool = False) -> History:
    quota = draw(quotas(20))
    history = History(quota, [])
    now = draw(starts)
    costs = st.integers(0, quota.limit + 2) | st.sampled_from([1, 1, 1, quota.limit])
    step = steps(history.window, back=back)
    if spaced:
        # Two microseconds over, because a float of seconds rounds either way.
        step = step.map(lambda seconds: seconds + (history.part + 2) / SECOND)
    for seconds, cost in draw(st.lists(st.tuples(step, costs), min_size=1, max_size=60)):
        now += seconds
        history.asks.append(Ask(now, cost))
    return history


@st.composite
def crowds(draw: st.DrawFn, *algorithms: Algorithm) -> History:
    """Small requests at a steady pace, many to a window and some to a part."""
    quota = draw(quotas(20, *algorithms) | quotas(250, *algorithms))
    history = History(quota, [])
    pace = history.window / SECOND / draw(st.integers(25, 120))
    now = draw(starts)
    for times in draw(st.lists(st.integers(0, 2), min_size=60, max_size=80)):
        now += times * pace
        history.asks.append(Ask(now, 1))
    return history


def take(marks: "array[int]", quota: Quota, ask: Ask) -> Usage:
    usage = decide(marks, quota, ask.cost, ask.now)
    if usage.allowed and ask.cost:
        charge(marks, quota, ask.cost, ask.now)
    return usage


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("A memory store never pauses")


# A look, or a denial, at an instant that the clock then takes back.
AFTER_A_LOOK = History(Quota(1, per=1), [Ask(0.0, 1), Ask(1.0, 0), Ask(0.5, 1)])
AFTER_A_DENIAL = History(Quota(2, per=1), [Ask(0.0, 1), Ask(0.5, 1), Ask(1.0, 2), Ask(0.9, 1)])
many = settings(deadline=None, max_examples=250)


@many
@given(histories() | crowds())
def test_no_window_ever_holds_more_than_the_limit(history: History) -> None:
    marks, log = empty(), ExactLog()
    for ask in history.asks:
        if take(marks, history.quota, ask).allowed:
            log.admit(ask.now, ask.cost)
    assert log.most_in_a_window(history.window) <= history.quota.limit


@many
@given(histories(back=True))
@example(AFTER_A_LOOK)
@example(AFTER_A_DENIAL)
def test_no_window_ever_holds_more_than_the_limit_though_the_clock_steps_back(history: History) -> None:
    marks, log = empty(), ExactLog()
    for ask in history.asks:
        if take(marks, history.quota, ask).allowed and ask.cost:
            log.admit(ask.now, ask.cost)
    assert log.most_in_a_window(history.window) <= history.quota.limit


@many
@given(histories(back=True))
def test_a_retry_after_the_wait_is_admitted_and_the_wait_is_no_longer_than_it_must(history: History) -> None:
    marks, log, quota = empty(), ExactLog(), history.quota
    for ask in history.asks:
        usage = take(marks, quota, ask)
        if usage.allowed:
            assert usage.retry_after == 0
            if ask.cost:
                log.admit(ask.now, ask.cost)
            continue
        if ask.cost > quota.limit:
            assert usage.retry_after == inf
            continue
        event("denied")
        seen = max(ask.now, log.instant(ask.now) / SECOND)
        assert 0 < usage.retry_after <= (history.window + 1) / SECOND
        assert decide(marks[:], quota, ask.cost, seen + usage.retry_after).allowed
        if usage.retry_after > MICROSECONDS:
            assert not decide(marks[:], quota, ask.cost, seen + usage.retry_after - MICROSECONDS).allowed


@many
@given(histories())
def test_a_denial_and_a_look_are_as_if_they_had_never_been(history: History) -> None:
    quota = history.quota
    asked, spared = empty(), empty()
    for ask in history.asks:
        usage = take(asked, quota, ask)
        if usage.allowed and ask.cost:
            assert take(spared, quota, ask) == usage
    last = history.asks[-1].now
    for later in (0.0, quota.per / 3, quota.per * 0.99, quota.per, 2 * quota.per):
        for cost in (0, 1, quota.limit):
            assert decide(asked, quota, cost, last + later) == decide(spared, quota, cost, last + later)


@many
@given(histories(back=True))
@example(AFTER_A_LOOK)
@example(AFTER_A_DENIAL)
def test_a_denial_is_as_if_it_had_never_been_though_the_clock_steps_back(history: History) -> None:
    quota = history.quota
    asked, spared = empty(), empty()
    for ask in history.asks:
        usage = take(asked, quota, ask)
        if usage.allowed and ask.cost:
            assert take(spared, quota, ask) == usage


@many
@given(histories(back=True) | crowds())
def test_the_state_never_grows_over_one_mark_a_part_and_one_more(history: History) -> None:
    marks = empty()
    for ask in history.asks:
        take(marks, history.quota, ask)
        assert len(marks) % 2 == 1
        assert len(marks) // 2 <= (history.quota.limit if history.part == 1 else PARTS + 1)
        assert marks[0] == sum(marks[2::2]) <= history.quota.limit


@many
@given(histories(), st.floats(0, 10))
def test_an_expired_state_answers_as_a_fresh_one(history: History, windows_later: float) -> None:
    marks, quota = empty(), history.quota
    for ask in history.asks:
        take(marks, quota, ask)
    if len(marks) == 1:
        assert expires_at(marks, quota) == 0
        return
    now = expires_at(marks, quota) + windows_later * quota.per
    for cost in range(quota.limit + 2):
        assert decide(marks[:], quota, cost, now) == decide(empty(), quota, cost, now)


@many
@given(histories())
def test_a_state_that_has_not_expired_still_counts(history: History) -> None:
    marks, quota = empty(), history.quota
    for ask in history.asks:
        take(marks, quota, ask)
    if len(marks) > 1:
        assert decide(marks, quota, 0, expires_at(marks, quota) - MICROSECONDS).remaining < quota.limit


@many
@given(histories() | crowds())
def test_what_remains_is_what_an_exact_log_leaves_or_up_to_a_part_late(history: History) -> None:
    marks, log, quota = empty(), ExactLog(), history.quota
    for ask in history.asks:
        usage = take(marks, quota, ask)
        if usage.allowed:
            log.admit(ask.now, ask.cost)
        instant = log.instant(ask.now)
        exact = quota.limit - log.used(instant, history.window)
        late = quota.limit - log.used(instant, history.window + history.part)
        assert usage.limit == quota.limit
        assert 0 <= usage.remaining <= exact
        assert usage.remaining >= late


@many
@given(histories() | crowds())
def test_what_an_exact_log_with_a_part_more_admits_is_admitted(history: History) -> None:
    marks, log, quota = empty(), ExactLog(), history.quota
    for ask in history.asks:
        instant = log.instant(ask.now)
        fits = log.used(instant, history.window) + ask.cost <= quota.limit
        fits_late = log.used(instant, history.window + history.part) + ask.cost <= quota.limit
        usage = take(marks, quota, ask)
        assert fits_late <= usage.allowed <= fits
        if usage.allowed:
            log.admit(ask.now, ask.cost)


@many
@given(histories(spaced=True) | crowds("sliding_log"))
def test_requests_a_part_apart_or_in_a_log_are_counted_exactly(history: History) -> None:
    marks, log, quota = empty(), ExactLog(), history.quota
    for ask in history.asks:
        fits = log.used(log.instant(ask.now), history.window) + ask.cost <= quota.limit
        usage = take(marks, quota, ask)
        assert usage.allowed == fits
        if fits:
            log.admit(ask.now, ask.cost)
        assert usage.remaining == quota.limit - log.used(log.instant(ask.now), history.window)


@many
@given(histories())
def test_more_is_free_once_the_reset_is_over_and_not_before(history: History) -> None:
    marks, quota = empty(), history.quota
    for ask in history.asks:
        usage = take(marks, quota, ask)
        assert 0 <= usage.reset_after <= quota.per
        assert (usage.reset_after == 0) == (usage.remaining == quota.limit)
        if usage.reset_after > MICROSECONDS:
            before = decide(marks[:], quota, 0, ask.now + usage.reset_after - MICROSECONDS)
            assert before.remaining == usage.remaining
            after = decide(marks[:], quota, 0, ask.now + usage.reset_after + MICROSECONDS)
            assert after.remaining > usage.remaining


RULES = (Quota(3, per=1), Quota(7, per=10), Quota(5, per=10))
wanted = st.lists(
    st.builds(
        lambda quota, subject, cost: Want(quota.name, subject, quota, cost),
        st.sampled_from(RULES),
        st.sampled_from(["ann", "bob"]),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda want: (want.rule, want.subject),
)
pauses = st.sampled_from([0.0, 0.01, 1 / 30, 0.4, 1.0, 3.0, 10.0, 11.0])


def look(store: MemoryStore) -> Sequence[Usage]:
    wants = [Want(quota.name, subject, quota, 0) for quota in RULES for subject in ("ann", "bob")]
    return at_once(store.acquire(wants))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(pauses, wanted), min_size=1, max_size=30), starts)
def test_several_rules_take_all_or_nothing(requests: list[tuple[float, list[Want]]], start: float) -> None:
    clock = ManualClock(start)
    store = MemoryStore(clock=clock)
    logs = {(quota.name, subject): ExactLog() for quota in RULES for subject in ("ann", "bob")}
    for pause, wants in requests:
        clock.advance(pause)
        alone = [at_once(deepcopy(store).acquire([want]))[0] for want in wants]
        before = look(store)
        usages = at_once(store.acquire(wants))
        assert usages == alone
        if all(usage.allowed for usage in usages):
            for want, usage in zip(wants, usages, strict=True):
                logs[want.rule, want.subject].admit(clock(), want.cost)
                assert at_once(store.acquire([want._replace(cost=0)]))[0].remaining == usage.remaining
        else:
            assert look(store) == before
    for quota in RULES:
        for subject in ("ann", "bob"):
            assert logs[quota.name, subject].most_in_a_window(round(quota.per * SECOND)) <= quota.limit
