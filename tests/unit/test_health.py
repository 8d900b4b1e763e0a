import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from resilience.decisions.readiness import HealthChange, HealthStatus, Phase
from resilience.errors import ConfigurationError
from resilience.health import ComponentHealth, Found, HealthChecker, HealthReport
from resilience.testing import ManualClock

HEALTHY, DEGRADED, UNHEALTHY = HealthStatus.HEALTHY, HealthStatus.DEGRADED, HealthStatus.UNHEALTHY


class Gate:
    """A check that waits to be let through, and counts how often it was begun."""

    def __init__(self, *, stubborn: bool = False) -> None:
        self.begun = 0
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()
        self.left = asyncio.Event()
        self._stubborn = stubborn

    async def check(self) -> None:
        self.begun += 1
        self.entered.set()
        while not self.opened.is_set():
            try:
                await self.opened.wait()
            except asyncio.CancelledError:
                if not self._stubborn:
                    raise
        self.left.set()


def returns(found: Found) -> Callable[[], Awaitable[Found]]:
    async def check() -> Found:
        return found

    return check


def raises(error: BaseException) -> Callable[[], Awaitable[Found]]:
    async def check() -> Found:
        raise error

    return check


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_a_component_shows_the_members_that_are_set() -> None:
    assert ComponentHealth("db", HEALTHY).to_dict() == {"status": "healthy"}
    assert ComponentHealth("db", DEGRADED, 1.23456, "Slow").to_dict() == {
        "status": "degraded",
        "latency_ms": 1.23,
        "message": "Slow",
    }
    assert ComponentHealth("db", HEALTHY, 0.0, "").to_dict() == {"status": "healthy", "latency_ms": 0.0, "message": ""}


def test_a_report_is_plain_data() -> None:
    report = HealthReport(DEGRADED, "1.2.3", "test", {"db": ComponentHealth("db", UNHEALTHY, 5.0, "Timed out")})
    assert report.to_dict() == {
        "status": "degraded",
        "version": "1.2.3",
        "environment": "test",
        "components": {"db": {"status": "unhealthy", "latency_ms": 5.0, "message": "Timed out"}},
    }
    assert HealthReport(HEALTHY, "", "").to_dict()["components"] == {}


async def test_a_quick_run_tells_that_the_process_is_alive() -> None:
    checker = HealthChecker("1.2.3", "test")
    assert await checker.run_quick() == {"status": "healthy", "version": "1.2.3", "environment": "test"}


async def test_a_quick_run_asks_no_check_and_is_healthy_while_the_service_drains() -> None:
    checker, gate = HealthChecker(), Gate()
    checker.add_check("db", gate.check)
    checker.drain()
    assert (await checker.run_quick())["status"] == "healthy"
    assert gate.begun == 0


async def test_a_service_without_checks_is_healthy() -> None:
    report = await HealthChecker("1", "e").run()
    assert report == HealthReport(HEALTHY, "1", "e", {})


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (None, HEALTHY),
        (True, HEALTHY),
        (False, UNHEALTHY),
        (ComponentHealth("db", HEALTHY), HEALTHY),
        (ComponentHealth("db", DEGRADED, 7.0, "Lagging"), DEGRADED),
        (ComponentHealth("db", UNHEALTHY), UNHEALTHY),
    ],
)
async def test_a_check_answers_by_what_it_returns(found: Found, status: HealthStatus) -> None:
    checker = HealthChecker()
    checker.add_check("db", returns(found))
    report = await checker.run()
    assert report.status is status
    assert report.components["db"].status is status
    if isinstance(found, ComponentHealth):
        assert report.components["db"] == found


async def test_a_sync_check_runs_in_a_thread() -> None:
    seen: list[int] = []

    def check() -> bool:
        seen.append(threading.get_ident())
        return False

    checker = HealthChecker()
    checker.add_check("disk", check)
    assert (await checker.run()).status is UNHEALTHY
    assert seen != [threading.get_ident()]
    assert len(seen) == 1


@pytest.mark.parametrize("found", [True, False])
async def test_a_sync_callable_that_returns_an_awaitable_is_awaited(found: bool) -> None:
    def begin() -> Awaitable[Found]:
        return returns(found)()

    checker = HealthChecker()
    checker.add_check("function", begin)
    checker.add_check("partial", partial(returns(found)))
    report = await checker.run()
    expected = HEALTHY if found else UNHEALTHY
    assert [one.status for one in report.components.values()] == [expected, expected]


async def test_the_latency_is_how_long_the_check_took(clock: ManualClock) -> None:
    async def check() -> None:
        clock.advance(0.25)

    checker = HealthChecker(clock=clock)
    checker.add_check("db", check)
    assert (await checker.run()).to_dict()["components"] == {"db": {"status": "healthy", "latency_ms": 250.0}}


async def test_an_exceptions_text_is_for_the_log_and_never_for_the_probe(caplog: pytest.LogCaptureFixture) -> None:
    checker = HealthChecker()
    checker.add_check("db", raises(ConnectionError("postgres://admin:hunter2@db.internal")))
    with caplog.at_level(logging.WARNING, "resilience"):
        report = await checker.run()
    shown = json.dumps(report.to_dict())
    assert report.status is UNHEALTHY
    assert report.components["db"].message == "ConnectionError"
    assert "hunter2" not in shown
    assert "db.internal" not in shown
    assert "hunter2" in caplog.text


async def test_one_failing_check_leaves_the_others_their_say() -> None:
    checker = HealthChecker()
    checker.add_check("bad", raises(RuntimeError("x")))
    checker.add_check("good", returns(True))
    report = await checker.run()
    assert [(name, one.status) for name, one in report.components.items()] == [("bad", UNHEALTHY), ("good", HEALTHY)]


async def test_a_check_that_ends_in_a_cancellation_of_its_own_is_a_failure_and_stays_one(clock: ManualClock) -> None:
    checker = HealthChecker(clock=clock)
    checker.add_check("pool", raises(asyncio.CancelledError()))
    for _ in range(2):
        assert (await checker.run()).components["pool"].status is UNHEALTHY
        clock.advance(2.0)


async def test_a_failure_that_is_not_critical_is_a_degradation() -> None:
    checker = HealthChecker()
    checker.add_check("cache", returns(False), critical=False)
    report = await checker.run()
    assert report.status is DEGRADED
    assert report.components["cache"].status is UNHEALTHY
    checker.add_check("db", returns(False))
    assert (await checker.run()).status is UNHEALTHY


async def test_a_check_that_swallows_cancellation_is_bounded_and_not_started_beside_itself(clock: ManualClock) -> None:
    checker, gate = HealthChecker(timeout=0.05, clock=clock), Gate(stubborn=True)
    checker.add_check("stuck", gate.check)
    probes: set[asyncio.Task[HealthReport]] = set()
    for _ in range(3):
        probe = asyncio.create_task(checker.run())
        await asyncio.wait({probe}, timeout=5)
        probes.add(probe)
        clock.advance(1.0)
    bounded = all(probe.done() for probe in probes)
    gate.opened.set()
    await gate.left.wait()
    assert bounded
    assert gate.begun == 1
    for probe in probes:
        assert (await probe).status is UNHEALTHY
        assert (await probe).to_dict()["components"] == {
            "stuck": {"status": "unhealthy", "latency_ms": 50.0, "message": "Timed out"}
        }


async def test_a_check_that_recovers_from_hanging_is_heard_again(clock: ManualClock) -> None:
    checker, gate = HealthChecker(timeout=0.05, clock=clock), Gate()
    checker.add_check("slow", gate.check)
    assert (await checker.run()).status is UNHEALTHY
    gate.opened.set()
    await gate.left.wait()
    clock.advance(1.0)
    assert (await checker.run()).status is HEALTHY
    assert gate.begun == 1
    clock.advance(1.0)
    assert (await checker.run()).status is HEALTHY
    assert gate.begun == 2


async def test_each_check_may_have_a_deadline_of_its_own(clock: ManualClock) -> None:
    checker, short, long = HealthChecker(timeout=60.0, clock=clock), Gate(), Gate()
    checker.add_check("short", short.check, timeout=0.05)
    checker.add_check("long", long.check)
    run = asyncio.create_task(checker.run())
    await long.entered.wait()
    long.opened.set()
    report = await run
    assert report.components["short"].to_dict()["message"] == "Timed out"
    assert report.components["long"].status is HEALTHY
    short.opened.set()
    await short.left.wait()


async def test_a_deadline_of_zero_is_not_the_checkers(clock: ManualClock) -> None:
    checker, gate = HealthChecker(timeout=60.0, clock=clock), Gate()
    checker.add_check("db", gate.check, timeout=0.0)
    assert (await asyncio.wait_for(checker.run(), 5)).status is UNHEALTHY
    gate.opened.set()
    await gate.left.wait()


async def test_a_late_probe_waits_only_for_what_is_left_of_the_deadline(clock: ManualClock) -> None:
    checker, gate = HealthChecker(timeout=60.0, clock=clock), Gate()
    checker.add_check("db", gate.check)
    first = asyncio.create_task(checker.run())
    await gate.entered.wait()
    clock.advance(60.0)
    assert (await asyncio.wait_for(checker.run(), 5)).status is UNHEALTHY
    gate.opened.set()
    assert (await first).status is HEALTHY


async def test_many_probes_are_one_run() -> None:
    checker, gate = HealthChecker(ttl=0.0), Gate()
    checker.add_check("db", gate.check)
    probes = [asyncio.create_task(checker.run()) for _ in range(10)]
    await gate.entered.wait()
    gate.opened.set()
    reports = await asyncio.gather(*probes)
    assert gate.begun == 1
    assert all(report.status is HEALTHY for report in reports)


async def test_checks_run_at_once() -> None:
    checker, one, other = HealthChecker(timeout=60.0), Gate(), Gate()
    checker.add_check("one", one.check)
    checker.add_check("other", other.check)
    run = asyncio.create_task(checker.run())
    await asyncio.gather(one.entered.wait(), other.entered.wait())
    one.opened.set()
    other.opened.set()
    assert (await run).status is HEALTHY


async def test_a_probe_that_hangs_up_leaves_the_check_running() -> None:
    checker, gate = HealthChecker(timeout=60.0, ttl=0.0), Gate()
    checker.add_check("db", gate.check)
    gone = asyncio.create_task(checker.run())
    await gate.entered.wait()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gate.opened.set()
    assert (await checker.run()).status is HEALTHY
    assert gate.begun == 1


async def test_a_finding_holds_for_its_ttl(clock: ManualClock) -> None:
    found: list[Found] = [True]

    async def check() -> Found:
        return found[0]

    checker = HealthChecker(ttl=5.0, clock=clock)
    checker.add_check("db", check)
    assert (await checker.run()).status is HEALTHY
    found[0] = False
    clock.advance(4.999)
    assert (await checker.run()).status is HEALTHY
    clock.advance(0.001)
    assert (await checker.run()).status is UNHEALTHY


async def test_a_check_that_is_added_while_a_probe_runs_is_asked_by_the_next() -> None:
    checker, gate = HealthChecker(timeout=60.0), Gate()
    checker.add_check("first", gate.check)
    run = asyncio.create_task(checker.run())
    await gate.entered.wait()
    checker.add_check("second", returns(False))
    gate.opened.set()
    assert (await run).components["first"].status is HEALTHY
    assert (await checker.run()).status is UNHEALTHY


@pytest.mark.parametrize("phase", ["starting", "draining", "stopped"])
async def test_a_service_that_does_not_run_is_unready_though_its_checks_are_fine(phase: Phase) -> None:
    checker = HealthChecker(phase=phase)
    checker.add_check("db", returns(True))
    report = await checker.run()
    assert report.status is UNHEALTHY
    assert report.components["db"].status is HEALTHY


async def test_a_service_goes_through_its_life_and_its_listeners_hear_each_phase() -> None:
    checker = HealthChecker(phase="starting")
    heard: list[tuple[str, Phase]] = []
    checker.subscribe(lambda: heard.append(("one", checker.phase)))
    checker.subscribe(lambda: heard.append(("other", checker.phase)))
    statuses = [(await checker.run()).status]
    for step in (checker.mark_ready, checker.drain, checker.stop):
        step()
        statuses.append((await checker.run()).status)
    assert statuses == [UNHEALTHY, HEALTHY, UNHEALTHY, UNHEALTHY]
    assert heard == [(who, phase) for phase in ("ready", "draining", "stopped") for who in ("one", "other")]


@pytest.mark.parametrize("last", [HealthChecker.drain, HealthChecker.stop])
async def test_a_service_that_has_begun_to_stop_is_never_ready_again(last: Callable[[HealthChecker], None]) -> None:
    checker = HealthChecker(phase="starting")
    last(checker)
    checker.mark_ready()
    assert (await checker.run()).status is HealthStatus.UNHEALTHY


async def test_a_draining_service_is_unready_at_once_though_findings_are_kept(clock: ManualClock) -> None:
    checker = HealthChecker(clock=clock, ttl=60.0)
    checker.add_check("db", returns(True))
    assert (await checker.run()).status is HEALTHY
    checker.drain()
    assert (await checker.run()).status is UNHEALTHY


def test_a_name_is_given_once() -> None:
    checker = HealthChecker()
    checker.add_check("db", returns(True))
    with pytest.raises(ConfigurationError, match="'db'"):
        checker.add_check("db", returns(False))


async def test_a_failure_holds_a_shorter_time_than_a_success(clock: ManualClock) -> None:
    checker, gate = HealthChecker(ttl=5.0, fail_ttl=1.0, clock=clock), Gate()
    gate.opened.set()
    found: list[Found] = [False]

    async def check() -> Found:
        gate.begun += 1
        return found[0]

    checker.add_check("db", check)
    assert (await checker.run()).status is UNHEALTHY
    found[0] = True
    clock.advance(1.0)
    assert (await checker.run()).status is HEALTHY
    clock.advance(1.0)
    await checker.run()
    assert gate.begun == 2


async def test_what_all_processes_share_degrades_and_never_takes_the_service_out() -> None:
    checker = HealthChecker()
    checker.add_check("redis", returns(False), scope="shared")
    report = await checker.run()
    assert report.status is DEGRADED
    assert report.components["redis"].status is UNHEALTHY


async def test_a_check_of_one_grpc_service_makes_that_one_unready_alone() -> None:
    checker = HealthChecker()
    checker.add_check("db", returns(True))
    checker.add_check("ledger", returns(False), services=["pkg.Ledger"])
    assert checker.services == {"pkg.Ledger"}
    assert (await checker.run(service="pkg.Ledger")).status is UNHEALTHY
    other = await checker.run(service="pkg.Other")
    assert (other.status, list(other.components)) == (HEALTHY, ["db"])
    whole = await checker.run()
    assert (whole.status, list(whole.components)) == (DEGRADED, ["db", "ledger"])


async def test_each_group_asks_its_own_checks_and_only_readiness_asks_for_the_phase() -> None:
    checker = HealthChecker(phase="starting")
    checker.add_check("loop", returns(False), groups=["live"])
    checker.add_check("migrations", returns(True), groups=["startup", "ready"])
    assert (await checker.run("live")).status is UNHEALTHY
    assert [(await checker.run(group)).status for group in ("startup", "ready")] == [UNHEALTHY, UNHEALTHY]
    checker.mark_ready()
    assert [(await checker.run(group)).status for group in ("startup", "ready")] == [HEALTHY, HEALTHY]
    checker.drain()
    assert [(await checker.run(group)).status for group in ("startup", "ready")] == [HEALTHY, UNHEALTHY]


async def test_a_component_that_flaps_is_told_once_it_stays(clock: ManualClock) -> None:
    answers = iter([True, False, True, False, False, True, True])

    async def check() -> Found:
        return next(answers)

    checker = HealthChecker(ttl=1.0, clock=clock)
    checker.add_check("db", check, fail_after=2, ok_after=2)
    told = []
    for _ in range(7):
        told.append((await checker.run()).components["db"].status)
        clock.advance(1.0)
    assert told == [HEALTHY, HEALTHY, HEALTHY, HEALTHY, UNHEALTHY, UNHEALTHY, HEALTHY]


@pytest.mark.parametrize("threshold", ["fail_after", "ok_after"])
def test_a_threshold_below_one_is_refused(threshold: str) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        HealthChecker().add_check("db", returns(True), **{threshold: 0})  # type: ignore[arg-type] # either of them


async def test_turns_are_remembered_and_told_and_a_failing_listener_harms_nobody(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[HealthChange] = []
    wakes: list[str] = []
    checker = HealthChecker(ttl=1.0, clock=clock, wall=clock)

    def fails(_change: HealthChange) -> None:
        raise RuntimeError("x")

    checker.on_change(fails)
    checker.on_change(heard.append)
    checker.subscribe(lambda: wakes.append("woken"))
    answers = iter([True, False, False, True])

    async def check() -> Found:
        return ComponentHealth("db", HEALTHY if next(answers) else UNHEALTHY, message="password=hunter2")

    checker.add_check("db", check)
    for _ in range(4):
        await checker.run()
        clock.advance(1.0)
    assert [(turn.name, turn.before, turn.after, turn.message) for turn in heard] == [
        ("db", HEALTHY, UNHEALTHY, "password=***"),
        ("db", UNHEALTHY, HEALTHY, "password=***"),
    ]
    assert checker.history() == heard
    assert [turn.at for turn in heard] == [clock() - 3.0, clock() - 1.0]
    assert len(wakes) == 2
    assert "A listener to health changes failed" in caplog.text


async def test_history_is_bounded(clock: ManualClock) -> None:
    answers = iter([bool(n % 2) for n in range(120)])

    async def check() -> Found:
        return next(answers)

    checker = HealthChecker(ttl=1.0, clock=clock)
    checker.add_check("db", check)
    for _ in range(120):
        await checker.run()
        clock.advance(1.0)
    assert len(checker.history()) == 50


@pytest.mark.parametrize("found", ["fine", 1, object(), {"status": "healthy"}])
async def test_a_check_that_returns_nonsense_is_unhealthy_and_says_so(found: object) -> None:
    checker = HealthChecker()
    checker.add_check("db", returns(found))  # type: ignore[arg-type] # that is the point
    report = await checker.run()
    assert report.status is UNHEALTHY
    assert report.components["db"].message == "The check returned neither health nor a truth"


async def test_a_blocking_check_holds_up_no_other_and_not_the_loop() -> None:
    release = threading.Event()
    checker = HealthChecker(timeout=0.05)
    checker.add_check("blocked", lambda: release.wait(5))
    checker.add_check("fine", lambda: True)
    try:
        report = await checker.run()
    finally:
        release.set()
    assert report.components["blocked"].message == "Timed out"
    assert report.components["fine"].status is HEALTHY


async def test_details_are_shown_only_where_they_are_asked_for() -> None:
    secret = "s3cr3t"
    checker = HealthChecker(token=secret)
    checker.add_check("db", returns(ComponentHealth("db", HEALTHY, details={"pool": 7})))
    report = await checker.run()
    assert "pool" not in json.dumps(report.to_dict())
    assert report.to_dict(details=True)["components"]["db"]["details"] == {"pool": 7}
    assert [checker.authorizes(token) for token in (secret, secret[:-1], "", "ü", None)] == [True] + [False] * 4
    assert not HealthChecker().authorizes("")
