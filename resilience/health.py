"""Floor 3: one checker for both doors: what runs, what answers, and where in its life the service is."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from hmac import compare_digest
from time import monotonic, time

from resilience.decisions import readiness
from resilience.decisions.readiness import ComponentHealth, HealthChange, HealthReport, HealthStatus, Phase
from resilience.errors import ConfigurationError
from resilience.health_check import Check, Found, HealthCheck, Scope

__all__ = ["Check", "ComponentHealth", "Found", "HealthChecker", "HealthReport", "Scope"]

logger = logging.getLogger("resilience")

READY, LIVE, STARTUP = "ready", "live", "startup"


class HealthChecker:
    """Answers whether this service is alive, and whether it should get work.

    Checks run at once, each under a hard deadline (a check that swallows its cancellation included), one run at a time
    however many probes ask, and what they found holds for a moment.

    Args:
        version, environment: told in every report.
        phase: where the service is in its life. ``starting`` keeps it unready until ``mark_ready``.
        timeout: seconds for one check; below 1, since that is what Kubernetes waits for a probe.
        ttl: seconds that a good finding holds.
        fail_ttl: seconds that any other finding holds; shorter, so that a recovery is soon seen.
        token: what authorises a probe to see ``details`` and history; nothing does where None.
        clock: seconds that never step back.
        wall: seconds since the epoch, for the history.
    """

    def __init__(
        self,
        version: str = "",
        environment: str = "",
        *,
        phase: Phase = "ready",
        timeout: float = 0.8,
        ttl: float = 1.0,
        fail_ttl: float = 0.5,
        token: str | None = None,
        clock: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ) -> None:
        self.version = version
        self.environment = environment
        self.phase: Phase = phase
        self._timeout = timeout
        self._ttl = ttl
        self._fail_ttl = min(fail_ttl, ttl)
        self._token = None if token is None else token.encode()
        self._clock = clock
        self._wall = wall
        self._checks: dict[str, HealthCheck] = {}
        self._wakes: list[Callable[[], None]] = []
        self._listeners: list[Callable[[HealthChange], None]] = []

    def add_check(
        self,
        name: str,
        check: Check,
        *,
        critical: bool = True,
        scope: Scope = "local",
        timeout: float | None = None,
        ttl: float | None = None,
        fail_after: int = 1,
        ok_after: int = 1,
        groups: Iterable[str] = (READY,),
        services: Iterable[str] = (),
    ) -> None:
        """Have ``check`` asked on each run.

        Args:
            name: the component's name.
            check: a function, sync or async. See ``Check``.
            critical: whether its failure makes the service unready; else the service is degraded, and serves.
            scope: ``shared`` for what all processes use, a Redis or a database: it never makes the service unready, for
                then all processes would be, at once, and nobody would be left to answer with what still works.
            timeout: seconds, where it differs from the checker's.
            ttl: seconds that a finding holds, where it differs from the checker's.
            fail_after: failures in a row that turn it unhealthy, at least 1.
            ok_after: successes in a row that turn it back, at least 1.
            groups: the probes that ask it: ``ready``, ``live``, ``startup``, or a name of yours.
            services: full names of gRPC services that depend on it; it makes these unready and no other. Empty means
                all of them, and the process as a whole.

        Raises:
            ConfigurationError: the name is taken, or a threshold is below 1.
        """
        if name in self._checks:
            raise ConfigurationError(f"There is a health check named {name!r} already.")
        if fail_after < 1 or ok_after < 1:
            raise ConfigurationError("fail_after and ok_after count findings: they are at least 1.")
        self._checks[name] = HealthCheck(
            name,
            check,
            critical,
            scope,
            self._timeout if timeout is None else timeout,
            self._ttl if ttl is None else ttl,
            self._fail_ttl if ttl is None else ttl,
            fail_after,
            ok_after,
            frozenset(groups),
            frozenset(services),
            self._clock,
            self._wall,
            self._turned,
        )

    def mark_ready(self) -> None:
        """Say that the service has started; too late where it has begun to stop."""
        if self.phase == "starting":
            self._enter("ready")

    def drain(self) -> None:
        """Say that the service will stop: unready from now on, alive until it ends."""
        self._enter("draining")

    def stop(self) -> None:
        """Say that the service has stopped."""
        self._enter("stopped")

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called at each change of phase or of a component; it must not block or raise."""
        self._wakes.append(wake)

    def on_change(self, listener: Callable[[HealthChange], None]) -> None:
        """Have ``listener`` told each turn of a component; it must not block. What it raises is logged."""
        self._listeners.append(listener)

    def history(self) -> list[HealthChange]:
        """Return the last turns of every component, at most 50 of each, the oldest first."""
        return sorted((turn for check in self._checks.values() for turn in check.history), key=lambda turn: turn.at)

    def authorizes(self, token: str | None) -> bool:
        """Tell whether a probe that brought ``token`` may see details."""
        return self._token is not None and token is not None and compare_digest(token.encode(), self._token)

    @property
    def services(self) -> frozenset[str]:
        """The gRPC services that some check speaks for."""
        return frozenset().union(*(check.services for check in self._checks.values()))

    async def run_quick(self) -> dict[str, str]:
        """Tell that the process is alive; asks no check, and stays healthy while the service drains."""
        return {"status": HealthStatus.HEALTHY.value, "version": self.version, "environment": self.environment}

    async def run(self, group: str = READY, *, service: str = "") -> HealthReport:
        """Ask every check of ``group`` whose finding is out of date, and report. Never raises.

        Args:
            group: ``ready`` asks whether the service should get work, which it should in the phase ``ready`` alone;
                ``live`` whether the process should go on, whatever its phase; ``startup`` whether it has started.
            service: the gRPC service that is asked for; ``""`` is the process as a whole.
        """
        asked = [check for check in self._checks.values() if group in check.groups]
        if service:
            asked = [check for check in asked if not check.services or service in check.services]
        found = await asyncio.gather(*(check.find() for check in asked))
        judged = ((one.status, check.decides(service)) for one, check in zip(found, asked, strict=True))
        status = readiness.decide(self._phase_for(group), judged)
        components = {check.name: one for one, check in zip(found, asked, strict=True)}
        return HealthReport(status, self.version, self.environment, components)

    def _phase_for(self, group: str) -> Phase:
        if group == READY:
            return self.phase
        return "starting" if group == STARTUP and self.phase == "starting" else "ready"

    def _enter(self, phase: Phase) -> None:
        if phase == self.phase:
            return
        self.phase = phase
        logger.info("The service is %s", phase)
        self._wake()

    def _turned(self, change: HealthChange) -> None:
        level = logging.INFO if change.after is HealthStatus.HEALTHY else logging.WARNING
        why = f": {change.message}" if change.message else ""
        logger.log(level, "The component %r is %s%s", change.name, change.after, why)
        for listener in self._listeners:
            try:
                listener(change)
            except Exception:
                logger.exception("A listener to health changes failed")
        self._wake()

    def _wake(self) -> None:
        for wake in self._wakes:
            wake()
