"""Ground floor: from single results to one answer."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple


class HealthStatus(StrEnum):
    """The health of one component, or of the whole service."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


Phase = Literal["starting", "ready", "draining", "stopped"]


@dataclass(slots=True)
class ComponentHealth:
    """What one check found.

    Args:
        name: the component's name.
        status: its health.
        latency_ms: how long the check took, in milliseconds; None where it was not measured.
        message: a short text for people. It goes to whoever may probe, so a checker redacts and cuts it.
        details: more, as plain data: for those only who are authorised to see it.
    """

    name: str
    status: HealthStatus
    latency_ms: float | None = None
    message: str | None = None
    details: Mapping[str, Any] | None = None

    def to_dict(self, *, details: bool = False) -> dict[str, Any]:
        """Return the members that are set, without the name; ``details`` only where they are asked for."""
        shown: dict[str, Any] = {"status": self.status.value}
        if self.latency_ms is not None:
            shown["latency_ms"] = round(self.latency_ms, 2)
        if self.message is not None:
            shown["message"] = self.message
        if details and self.details is not None:
            shown["details"] = dict(self.details)
        return shown


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What all checks found, and what follows from it."""

    status: HealthStatus
    version: str
    environment: str
    components: Mapping[str, ComponentHealth] = field(default_factory=dict)

    def to_dict(self, *, details: bool = False) -> dict[str, Any]:
        """Return the report as plain data; ``details`` of the components only where they are asked for."""
        return {
            "status": self.status.value,
            "version": self.version,
            "environment": self.environment,
            "components": {name: found.to_dict(details=details) for name, found in self.components.items()},
        }


class HealthChange(NamedTuple):
    """One component's turn from one status to another.

    Args:
        name: the component.
        before: its status until then.
        after: its status since.
        at: seconds since the epoch.
        message: what the check said.
    """

    name: str
    before: HealthStatus
    after: HealthStatus
    at: float
    message: str | None


def decide(phase: Phase, results: Iterable[tuple[HealthStatus, bool]]) -> HealthStatus:
    """Tell the readiness of a service in ``phase`` from each check's status and whether it is critical.

    Only a critical check can make the service unhealthy; any other failure is a degradation, which still serves.
    A service that does not run, or has begun to stop, is unhealthy whatever its checks say.
    """
    if phase != "ready":
        return HealthStatus.UNHEALTHY
    worst = HealthStatus.HEALTHY
    for status, critical in results:
        if status is HealthStatus.UNHEALTHY and critical:
            return HealthStatus.UNHEALTHY
        if status is not HealthStatus.HEALTHY:
            worst = HealthStatus.DEGRADED
    return worst


class Damped(NamedTuple):
    """A status that turns only after several equal findings.

    Args:
        status: what is told.
        against: how many findings in a row spoke against it.
    """

    status: HealthStatus
    against: int = 0


def damp(told: Damped | None, found: HealthStatus, fail_after: int, ok_after: int) -> Damped:
    """Return what is told after another finding.

    The first finding counts at once: until then nothing is known. Degraded serves, so to and from healthy it turns
    at once, too.

    Args:
        told: what was told before, or None.
        fail_after: findings in a row that turn it to unhealthy, at least 1.
        ok_after: findings in a row that turn it back, at least 1.
    """
    if told is None:
        return Damped(found)
    fails = found is HealthStatus.UNHEALTHY
    if fails == (told.status is HealthStatus.UNHEALTHY):
        return Damped(found)
    if told.against + 1 >= (fail_after if fails else ok_after):
        return Damped(found)
    return Damped(told.status, told.against + 1)


_LONGEST = 200
_SECRETS = (
    # The user and password of a URL. Greedy: a password may hold an "@" or a "/" that nobody escaped.
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)\S*@"), r"\1***@"),
    # "password=...", "token: ...", "Bearer ...", in whatever case.
    (
        re.compile(
            r"(?i)\b(\w*(?:passw(?:or)?d|pwd|secret|token|api_?key)\w*['\"]?\s*[=:]\s*)(?:'[^']*'|\"[^\"]*\"|\S+)"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+\S+"), r"\1 ***"),
    (re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]"), " "),
)


def redact(text: str) -> str:
    """Return ``text`` without what looks like a secret, on one line, of at most 200 characters."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
