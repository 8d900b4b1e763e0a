"""Floor 4: the checker over gRPC. Each watcher has a signal of its own, so none can stall another, or the drain.

Source: grpc/doc/health-checking.md; gRFC A90 for List.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resilience.decisions.readiness import HealthStatus
from resilience.health import LIVE, READY, STARTUP, HealthChecker

_Response = health_pb2.HealthCheckResponse
_GROUPS = {"liveness": LIVE, "readiness": READY, "startup": STARTUP}
"""Names that ask for a group of checks, as a Kubernetes probe can."""

_LEAVING = frozenset({"draining", "stopped"})
_REFRESH = 1.0  # Seconds between two looks at the checks while somebody watches.
_MOST_LISTED = 100  # Source: gRFC A90: a list of more is refused.


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # its base has no types
    """``grpc.health.v1.Health`` for a checker. Degraded still serves.

    Beside services it answers for ``liveness``, ``readiness`` and ``startup``.

    Args:
        checker: shared with the HTTP door.
        services: full names of the services that the server has, beside those that checks name; ``""`` is the server
            itself.
    """

    def __init__(self, checker: HealthChecker, services: Iterable[str] = ()) -> None:
        self._checker = checker
        self._given = frozenset({"", *services})
        self._watchers: set[asyncio.Event] = set()
        checker.subscribe(self._wake)

    @property
    def services(self) -> frozenset[str]:
        """The names of the services that it answers for."""
        return self._given | self._checker.services

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    async def _status(self, name: str) -> Any:
        if name in _GROUPS and name not in self.services:
            report = await self._checker.run(_GROUPS[name])
        elif name in self.services:
            report = await self._checker.run(service=name)
        else:
            return _Response.SERVICE_UNKNOWN
        return _Response.NOT_SERVING if report.status is HealthStatus.UNHEALTHY else _Response.SERVING

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the method's name in the .proto
        """Answer for one service; NOT_FOUND for one that is not here."""
        status = await self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "Unknown service")
        return _Response(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - as above
        """Answer now and at each change; end when the service drains, so that no watcher holds up the stop.

        Source: gRFC A17: a client asks again at once after a watch that told it something, and backs off after one that
        did not. So one that begins while the service drains is told nothing.
        """
        if self._checker.phase in _LEAVING:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "The service is draining")
        changed = asyncio.Event()
        self._watchers.add(changed)
        last = None
        try:
            while True:
                changed.clear()
                ending = self._checker.phase in _LEAVING
                status = await self._status(request.service)
                if status != last:
                    last = status
                    yield _Response(status=status)
                if ending:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), _REFRESH)
                except TimeoutError:
                    pass
        finally:
            self._watchers.discard(changed)

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002 - as above
        """Answer for every service; RESOURCE_EXHAUSTED where there are more than 100."""
        names = sorted(self.services)
        if len(names) > _MOST_LISTED:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"There are more than {_MOST_LISTED} services")
        statuses = [await self._status(name) for name in names]
        answers = {name: _Response(status=status) for name, status in zip(names, statuses, strict=True)}
        return health_pb2.HealthListResponse(statuses=answers)


def add_health(server: grpc.aio.Server, checker: HealthChecker, services: Iterable[str] = ()) -> None:
    """Serve ``checker`` as ``grpc.health.v1.Health``, which no policy of the interceptor touches."""
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(checker, services), server)


def health_server(checker: HealthChecker, services: Iterable[str] = ()) -> grpc.aio.Server:
    """Return a server of health alone, for a plaintext port of its own beside a server with TLS, or a busy one.

    It has no interceptor and no bound of concurrent calls, so that it answers when the other can't. It does not share
    its port: of two processes that are told to use one, the second can't start, where gRPC's default would let it.
    """
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_health(server, checker, services)
    return server
