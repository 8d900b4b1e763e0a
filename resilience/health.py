"""Floor 3: one checker for both doors: what runs, what answers, and where in its life the service is."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from inspect import isawaitable, iscoroutinefunction
from time import monotonic
from typing import Any

from resilience.decisions import readiness
from resilience.decisions.readiness import HealthStatus, Phase
from resilience.errors import ConfigurationError

logger = logging.getLogger("resilience")


@dataclass(slots=True)
class ComponentHealth:
    """What one check found.

    Args:
        name: the component's name.
        status: its health.
        latency_ms: how long the check took, in milliseconds; None where it was not measured.
        message: a short word for people; goes to whoever may probe, so it holds no secret.
    """

    name: str
    status: HealthStatus
    latency_ms: float | None = None
    message: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the members that are set, without the name."""
        shown: dict[str, Any] = {"status": self.status.value}
        if self.latency_ms is not None:
            shown["latency_ms"] = round(self.latency_ms, 2)
        if self.message is not None:
            shown["message"] = self.message
        return shown


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What all checks found, and what follows from it."""

    status: HealthStatus
    version: str
    environment: str
    components: Mapping[str, ComponentHealth] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "status": self.status.value,
            "version": self.version,
            "environment": self.environment,
            "components": {name: component.to_dict() for name, component in self.components.items()},
        }


Found = ComponentHealth | bool | None
Check = Callable[[], Awaitable[Found] | Found]
"""Returns a ``ComponentHealth``, a truth, or None for "fine"; or raises. Sync ones run in a thread."""


@dataclass(slots=True)
class _Probe:
    name: str
    check: Check
    critical: bool
    timeout: float
    found: ComponentHealth | None = None
    found_at: float = 0.0
    started_at: float = 0.0
    task: asyncio.Task[ComponentHealth] | None = None


class HealthChecker:
    """Answers whether this service is alive, and whether it should get work.

    Checks run at once, each under a hard deadline (a check that swallows its cancellation included), one run at a time
    however many probes ask, and what they found holds for ``ttl`` seconds.

    Args:
        version, environment: told in every report.
        phase: where the service is in its life. ``starting`` keeps it unready until ``mark_ready``.
        timeout: seconds for one check; below 1, since that is what Kubernetes waits for a probe.
        ttl: seconds that a finding holds.
        clock: seconds that never step back.
    """

    def __init__(
        self,
        version: str = "",
        environment: str = "",
        *,
        phase: Phase = "ready",
        timeout: float = 0.8,
        ttl: float = 1.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.version = version
        self.environment = environment
        self.phase: Phase = phase
        self._timeout = timeout
        self._ttl = ttl
        self._clock = clock
        self._probes: dict[str, _Probe] = {}
        self._listeners: list[Callable[[], None]] = []

    def add_check(self, name: str, check: Check, *, critical: bool = True, timeout: float | None = None) -> None:
        """Have ``check`` asked on each run.

        Args:
            critical: whether its failure makes the service unready; else the service is degraded, and serves.
            timeout: seconds, where it differs from the checker's.

        Raises:
            ConfigurationError: the name is taken.
        """
        if name in self._probes:
            raise ConfigurationError(f"There is a health check named {name!r} already.")
        self._probes[name] = _Probe(name, check, critical, self._timeout if timeout is None else timeout)

    def mark_ready(self) -> None:
        """Say that the service has started."""
        self._enter("ready")

    def drain(self) -> None:
        """Say that the service will stop: unready from now on, alive until it ends."""
        self._enter("draining")

    def stop(self) -> None:
        """Say that the service has stopped."""
        self._enter("stopped")

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called at each change of phase; it must not block or raise."""
        self._listeners.append(listener)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        logger.info("The service is %s", phase)
        for listener in self._listeners:
            listener()

    async def run_quick(self) -> dict[str, str]:
        """Tell that the process is alive; asks no check, and stays healthy while the service drains."""
        return {"status": HealthStatus.HEALTHY.value, "version": self.version, "environment": self.environment}

    async def run(self) -> HealthReport:
        """Ask every check whose finding is out of date, and report. Never raises."""
        probes = list(self._probes.values())
        found = await asyncio.gather(*(self._find(probe) for probe in probes))
        judged = ((one.status, probe.critical) for one, probe in zip(found, probes, strict=True))
        status = readiness.decide(self.phase, judged)
        components = {probe.name: one for one, probe in zip(found, probes, strict=True)}
        return HealthReport(status, self.version, self.environment, components)

    async def _find(self, probe: _Probe) -> ComponentHealth:
        now = self._clock()
        if probe.found is not None and now - probe.found_at < self._ttl:
            return probe.found
        if probe.task is None:
            probe.started_at = now
            probe.task = asyncio.get_running_loop().create_task(_ask(probe, self._clock))
        task = probe.task
        # asyncio.wait, because a check that swallows cancellation would outlast wait_for and timeout.
        left = probe.timeout - (now - probe.started_at)
        await asyncio.wait({task}, timeout=max(0.0, left))
        if task.done():
            # A check that lets a cancellation out is one that failed.
            gone = ComponentHealth(probe.name, HealthStatus.UNHEALTHY, message="Cancelled")
            probe.found, probe.task = gone if task.cancelled() else task.result(), None
        else:
            # It stays: a second run beside one that hangs would only hang too.
            probe.found = ComponentHealth(probe.name, HealthStatus.UNHEALTHY, probe.timeout * 1000, "Timed out")
        probe.found_at = self._clock()
        return probe.found


async def _ask(probe: _Probe, clock: Callable[[], float]) -> ComponentHealth:
    started = clock()
    try:
        answer = probe.check() if iscoroutinefunction(probe.check) else await asyncio.to_thread(probe.check)
        found = await answer if isawaitable(answer) else answer
    except Exception as error:
        # Its text may hold a password or a host name: that is for the log, the class is for the probe.
        logger.warning("The health check %r failed", probe.name, exc_info=True)
        return ComponentHealth(probe.name, HealthStatus.UNHEALTHY, _ms(clock() - started), type(error).__name__)
    if isinstance(found, ComponentHealth):
        return found
    status = HealthStatus.HEALTHY if found is None or found else HealthStatus.UNHEALTHY
    return ComponentHealth(probe.name, status, _ms(clock() - started))


def _ms(seconds: float) -> float:
    return seconds * 1000
