"""Floor 4: the checker over gRPC. Each watcher has a signal of its own, so none can stall another, or the drain.

Source: grpc/doc/health-checking.md; gRFC A90 for List.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resilience.decisions.readiness import HealthStatus
from resilience.health import HealthChecker

_Response = health_pb2.HealthCheckResponse
_REFRESH = 1.0  # Seconds between two looks at the checks while somebody watches.


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # its base has no types
    """``grpc.health.v1.Health`` for a checker. Degraded still serves.

    Args:
        checker: shared with the HTTP door.
        services: full names of the services that the server has; ``""`` is the server itself.
    """

    def __init__(self, checker: HealthChecker, services: Iterable[str] = ()) -> None:
        self._checker = checker
        self._services = frozenset({"", *services})
        self._watchers: set[asyncio.Event] = set()
        checker.subscribe(self._wake)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    async def _status(self) -> Any:
        report = await self._checker.run()
        return _Response.NOT_SERVING if report.status is HealthStatus.UNHEALTHY else _Response.SERVING

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the method's name in the .proto
        """Answer for one service; NOT_FOUND for one that is not here."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "Unknown service")
        return _Response(status=await self._status())

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802, ARG002 - as above
        """Answer now and at each change; end when the service drains, so that no watcher holds up the stop."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        last = None
        try:
            while True:
                changed.clear()
                ending = self._checker.phase in ("draining", "stopped")
                known = request.service in self._services
                status = await self._status() if known else _Response.SERVICE_UNKNOWN
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
        """Answer for every service."""
        answer = _Response(status=await self._status())
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, answer))


def add_health(server: grpc.aio.Server, checker: HealthChecker, services: Iterable[str] = ()) -> None:
    """Serve ``checker`` as ``grpc.health.v1.Health``, which no policy of the interceptor touches."""
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(checker, services), server)
