"""Floor 3: one check: asked once at a time, under a hard deadline, remembered for a moment, and damped."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from inspect import isawaitable, iscoroutinefunction
from typing import Literal

from resilience.decisions.readiness import ComponentHealth, Damped, HealthChange, HealthStatus, damp, redact
from resilience.threads import in_thread

logger = logging.getLogger("resilience")

Found = ComponentHealth | bool | None
Check = Callable[[], Awaitable[Found] | Found]
"""Returns a ``ComponentHealth``, a truth, or None for "fine"; or raises. Sync ones run in a thread of their own."""

Scope = Literal["local", "shared"]
"""Whose trouble it is: this process's own, or one of all processes at once, where unreadiness would save nobody."""

_HISTORY = 50  # Turns of one check that are remembered.


@dataclass(slots=True)
class HealthCheck:
    """A registered check and what it found last. ``HealthChecker.add_check`` makes it.

    Args:
        name: the component's name.
        ask: the check itself.
        critical: whether its failure makes the service unready.
        scope: ``shared`` is reported, and degrades, but never makes the service unready.
        timeout: seconds that probes wait for it.
        ttl, fail_ttl: seconds that a good finding holds, and any other.
        fail_after, ok_after: findings in a row that turn it.
        groups: the probes that ask it.
        services: the gRPC services that it speaks for; all where empty.
        clock: seconds that never step back.
        wall: seconds since the epoch.
        turned: told each turn of the status.
    """

    name: str
    ask: Check
    critical: bool
    scope: Scope
    timeout: float
    ttl: float
    fail_ttl: float
    fail_after: int
    ok_after: int
    groups: frozenset[str]
    services: frozenset[str]
    clock: Callable[[], float]
    wall: Callable[[], float]
    turned: Callable[[HealthChange], None]
    history: deque[HealthChange] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    """Its turns from one status to another, the oldest first."""
    _told: Damped | None = None
    _found: ComponentHealth | None = None
    _found_at: float = 0.0
    _started_at: float = 0.0
    _task: asyncio.Task[ComponentHealth] | None = None

    def decides(self, service: str) -> bool:
        """Tell whether its failure makes ``service`` unready; ``""`` is the process as a whole."""
        return self.critical and self.scope == "local" and (not self.services or service in self.services)

    async def find(self) -> ComponentHealth:
        """Return what it finds, or found a moment ago. Never raises."""
        now = self.clock()
        found = self._found
        if found is not None:
            holds = self.ttl if found.status is HealthStatus.HEALTHY else self.fail_ttl
            if now - self._found_at < holds:
                return found
        if self._task is None:
            self._started_at = now
            self._task = asyncio.get_running_loop().create_task(self._ask())
        task = self._task
        # asyncio.wait, because a check that swallows cancellation would outlast wait_for and timeout.
        await asyncio.wait({task}, timeout=max(0.0, self.timeout - (now - self._started_at)))
        if task is not self._task and self._found is not None:
            return self._found  # another probe of the same run has noted it
        if task.done():
            self._task = None
            # A check that lets a cancellation out is one that failed.
            gone = ComponentHealth(self.name, HealthStatus.UNHEALTHY, message="Cancelled")
            return self._note(gone if task.cancelled() else task.result())
        # It stays: a second run beside one that hangs would only hang too.
        return self._note(ComponentHealth(self.name, HealthStatus.UNHEALTHY, self.timeout * 1000, "Timed out"))

    def _note(self, found: ComponentHealth) -> ComponentHealth:
        before = self._told
        self._told = damp(before, found.status, self.fail_after, self.ok_after)
        message = None if found.message is None else redact(found.message)
        self._found = replace(found, status=self._told.status, message=message)
        self._found_at = self.clock()
        was = HealthStatus.HEALTHY if before is None else before.status
        if was is not self._told.status:
            change = HealthChange(self.name, was, self._told.status, self.wall(), message)
            self.history.append(change)
            self.turned(change)
        return self._found

    async def _ask(self) -> ComponentHealth:
        started = self.clock()
        try:
            call = getattr(self.ask, "__call__", None)  # noqa: B004 - its style is asked for, not whether there is one
            if iscoroutinefunction(self.ask) or iscoroutinefunction(call):
                answer: object = self.ask()
            else:
                answer = await in_thread(self.ask)
            found = await answer if isawaitable(answer) else answer
        except Exception as error:
            # Its text may hold a password or a host name: that is for the log, the class is for the probe.
            logger.warning("The health check %r failed", self.name, exc_info=True)
            message: str | None = type(error).__name__
            return ComponentHealth(self.name, HealthStatus.UNHEALTHY, self._since(started), message)
        if isinstance(found, ComponentHealth):
            return found
        message = None if found is None or isinstance(found, bool) else "The check returned neither health nor a truth"
        if message is not None:
            logger.warning("The health check %r returned a %s", self.name, type(found).__name__)
        status = HealthStatus.HEALTHY if found is None or found is True else HealthStatus.UNHEALTHY
        return ComponentHealth(self.name, status, self._since(started), message)

    def _since(self, started: float) -> float:
        return (self.clock() - started) * 1000
