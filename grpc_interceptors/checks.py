"""Floor 4: a check of another service over its ``grpc.health.v1``.

Source: grpc/doc/health-checking.md.
"""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from resilience.checks.checked import Unmet, checked
from resilience.decisions.readiness import ComponentHealth

_ServingStatus = health_pb2.HealthCheckResponse.ServingStatus


async def check_grpc(channel: grpc.aio.Channel, service: str = "", *, timeout: float = 2.0) -> ComponentHealth:  # noqa: ASYNC109 - the call's deadline
    """Ask another service for its health: SERVING is healthy.

    The message is the status that it answered, or the code of what went wrong: UNIMPLEMENTED where it does not answer
    for its health at all, NOT_FOUND where it does not know ``service``.

    Args:
        channel: the application's own, with its connection, certificates and credentials.
        service: the full name that is asked for; ``""`` is the server as a whole.
        timeout: seconds, > 0, for all of it.
    """
    stub: Any = health_pb2_grpc.HealthStub(channel)

    async def ask() -> None:
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            raise Unmet(error.code().name) from None  # its text tells addresses
        if answer.status != _ServingStatus.SERVING:
            # An enum is open: a newer server may answer what this stub has no name for.
            known = answer.status in _ServingStatus.values()
            raise Unmet(_ServingStatus.Name(answer.status) if known else "Unknown status")

    return await checked("grpc", ask)
