import pytest

from resilience.decisions.readiness import Damped, HealthStatus, Phase, damp, decide, redact

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


@pytest.mark.parametrize(
    ("findings", "fail_after", "ok_after", "told"),
    [
        ("h", 1, 1, "h"),
        ("u", 3, 1, "u"),  # the first finding is all that is known
        ("hu", 1, 1, "hu"),
        ("huu", 2, 1, "hhu"),
        ("huhuuh", 2, 1, "hhhhuh"),  # a success in between starts the count anew
        ("uhh", 1, 2, "uuh"),
        ("uhuhh", 1, 2, "uuuuh"),
        ("hdhdu", 2, 1, "hdhdd"),  # degraded serves
        ("uud", 2, 2, "uuu"),
        ("uudd", 2, 2, "uuud"),
        ("hudu", 2, 2, "hhdd"),
    ],
)
def test_a_status_turns_after_so_many_findings_in_a_row(
    findings: str, fail_after: int, ok_after: int, told: str
) -> None:
    letters = {status.value[0]: status for status in HealthStatus}
    damped: Damped | None = None
    seen = ""
    for letter in findings:
        damped = damp(damped, letters[letter], fail_after, ok_after)
        seen += damped.status.value[0]
    assert seen == told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("could not connect to redis://:s3cr3t/pw@host:6379/0", "could not connect to redis://***@host:6379/0"),
        ("pg+asyncpg://admin:hunter2@db.internal/app is down", "pg+asyncpg://***@db.internal/app is down"),
        ("redis://admin:p@ss@w0rd@host", "redis://***@host"),
        ('login failed: password="hunter2" for x', "login failed: password=*** for x"),
        ("PGPASSWORD=hunter2", "PGPASSWORD=***"),
        ("{'api_key': 'abc def'}", "{'api_key': ***}"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("two\nlines\x1b[31m", "two lines [31m"),
        ("x" * 300, "x" * 199 + "…"),
        ("Connected", "Connected"),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown
