"""Ground floor: from single results to one answer."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal


class HealthStatus(StrEnum):
    """The health of one component, or of the whole service."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


Phase = Literal["starting", "ready", "draining", "stopped"]


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
