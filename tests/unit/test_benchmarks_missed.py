"""What ``./dev bench`` says of a budget that was missed, and whom its sampler finds busy. Nothing is held to time."""

import gc
import signal
from time import process_time

import pytest

from benchmarks.budgets import PROMISES, Promise
from benchmarks.reasons import REASONS, missed
from benchmarks.report import Row, Section, Table, as_text_of_missed, results_page
from benchmarks.sampler import COLLECTOR, Place, Sampler

AT_THE_BOUND = {part.key: part.bound for promise in PROMISES for part in promise.parts}
FLOORS = dict.fromkeys(
    [
        *(f"{at}.{what}" for at in ("raw", "route") for what in ("wrapped", "ids", "bare", "all", "context")),
        *("crowd.bare", "crowd.limit", "new.link", "new.redis-py", "new.memory"),
        *(f"free.{peer}" for peer in ("slowapi", "throttled-py", "fastapi-redis-sdk", "fastapi-limiter")),
    ],
    4.25,
)


def past(promise: Promise) -> dict[str, float]:
    """Return figures that miss one promise, and no other."""
    part = promise.parts[0]
    return {**AT_THE_BOUND, **FLOORS, part.key: part.bound * (1.01 if part.most else 0.99)}


EXPLAINED = [promise for promise in PROMISES if promise.parts[0].key in REASONS]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.parts[0].key)
def test_a_budget_that_was_missed_and_no_other_is_listed(promise: Promise) -> None:
    assert [late.promise for late in missed(past(promise))] == [promise]
    assert missed(AT_THE_BOUND) == []


@pytest.mark.parametrize("promise", EXPLAINED, ids=lambda promise: promise.parts[0].key)
def test_it_is_listed_with_its_figures_its_profile_and_a_reason_made_of_the_runs_own_figures(promise: Promise) -> None:
    found = past(promise)
    profile = Table(REASONS[promise.parts[0].key].profile, ("guarded",), (Row("ours: somewhere", (98.7,)),), "Here.")
    (late,) = missed(found)
    page = results_page([], [Section("Profiles", (profile,), {}), Section("Rest", (), found)], "")
    assert f"### Missed: {promise.what}" in page
    assert "4.2" in late.why
    assert late.why in page
    assert page.count("98.7") == 1
    assert page.index(late.why) < page.index("98.7") < page.index("## Machine")
    assert late.promise.what in as_text_of_missed(late).replace("\n  ", " ")


@pytest.mark.parametrize("promise", [one for one in PROMISES if one not in EXPLAINED], ids=lambda one: one.parts[0].key)
def test_a_miss_that_nobody_has_explained_says_so(promise: Promise) -> None:
    (late,) = missed(past(promise))
    assert late.why == "No reason is known."


def test_a_reason_whose_figures_were_not_measured_says_so() -> None:
    (late,) = missed({**AT_THE_BOUND, "http.context": 9.0})
    assert "'raw.ids', was not measured" in late.why


def busy(seconds: float) -> None:
    until = process_time() + seconds
    while process_time() < until:
        sum(range(100))


def test_the_sampler_finds_who_was_busy() -> None:
    with Sampler() as sampler:
        busy(0.1)
    assert max(sampler.seconds, key=sampler.seconds.__getitem__) == Place(__name__, "busy")


def test_the_sampler_tells_the_collector_from_whoever_it_interrupts() -> None:
    kept: list[object] = [[] for _ in range(100_000)]
    with Sampler() as sampler:
        for _ in range(10):
            gc.collect()
    assert kept
    assert max(sampler.seconds, key=sampler.seconds.__getitem__) == COLLECTOR


def test_the_sampler_leaves_nothing_behind() -> None:
    before = signal.getsignal(signal.SIGALRM), list(gc.callbacks)
    with Sampler():
        busy(0.01)
    assert (signal.getsignal(signal.SIGALRM), list(gc.callbacks)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
