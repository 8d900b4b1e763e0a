import pytest

from resilience.decisions.readiness import HealthStatus, Phase, decide

HEALTHY, DEGRADED, UNHEALTHY = HealthStatus.HEALTHY, HealthStatus.DEGRADED, HealthStatus.UNHEALTHY


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([], HEALTHY),
        ([(HEALTHY, True), (HEALTHY, False)], HEALTHY),
        ([(DEGRADED, True)], DEGRADED),
        ([(DEGRADED, False)], DEGRADED),
        ([(UNHEALTHY, False)], DEGRADED),
        ([(UNHEALTHY, True)], UNHEALTHY),
        ([(UNHEALTHY, False), (HEALTHY, True)], DEGRADED),
        ([(UNHEALTHY, False), (UNHEALTHY, True)], UNHEALTHY),
        ([(HEALTHY, True), (UNHEALTHY, True), (HEALTHY, True)], UNHEALTHY),
        ([(DEGRADED, True), (HEALTHY, True)], DEGRADED),
    ],
)
def test_only_a_critical_failure_makes_a_running_service_unhealthy(
    results: list[tuple[HealthStatus, bool]], status: HealthStatus
) -> None:
    assert decide("ready", results) is status


@pytest.mark.parametrize("phase", ["starting", "draining", "stopped"])
@pytest.mark.parametrize("results", [[], [(HEALTHY, True)]])
def test_a_service_that_does_not_run_is_unhealthy_whatever_its_checks_say(
    phase: Phase, results: list[tuple[HealthStatus, bool]]
) -> None:
    assert decide(phase, results) is UNHEALTHY
