"""Floor 4: the gRPC door: one interceptor for all four kinds, one cached wrapper per method.

Both stages of the pipeline stand here, one after the other. List an interceptor that authenticates *before*
this one, so that it has spoken when limits and keys are asked for.
"""

from collections.abc import Awaitable, Callable

import grpc
from google.protobuf import descriptor_pool

from grpc_interceptors.method import Handler, Method
from grpc_interceptors.serving import invocation, wrap
from resilience.errors import ConfigurationError
from resilience.pipeline import Pipeline

EXEMPT = frozenset(
    {
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)
"""Services that no policy touches: who probes or debugs must get through, most of all when the service is busy."""

_MOST_METHODS = 4096  # A generic handler may answer any name, so the cache is bounded.


class ResilienceInterceptor(grpc.aio.ServerInterceptor):
    """Guards a ``grpc.aio`` server: ``grpc.aio.server(interceptors=[..., ResilienceInterceptor(pipeline)])``.

    Args:
        pipeline: the policies.

    Raises:
        ConfigurationError: a policy names a method that its service does not have.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}
        for operation in pipeline.operations():
            _verify(operation)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the guarded handler; an unknown method stays unknown, and no policy hears of it."""
        handler = await continuation(handler_call_details)
        name: str = handler_call_details.method
        if handler is None or name[1:].partition("/")[0] in EXEMPT:
            return handler
        invocation.set(handler_call_details.invocation_metadata)
        known = self._wrapped.get(name)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = wrap(Method.of(name, handler), handler, self._pipeline)
        if len(self._wrapped) < _MOST_METHODS:
            self._wrapped[name] = (handler, wrapped)
        return wrapped


def _verify(operation: str) -> None:
    if not operation.startswith("/"):
        return
    service, _, method = operation[1:].partition("/")
    try:
        descriptor = descriptor_pool.Default().FindServiceByName(service)
    except KeyError:
        raise ConfigurationError(
            f"A policy names {operation}, and no service {service!r} is known. "
            "Correct the name, or import the service's _pb2 module before the interceptor is made."
        ) from None
    if method not in descriptor.methods_by_name:
        known = ", ".join(sorted(descriptor.methods_by_name))
        raise ConfigurationError(f"A policy names {operation}, which is no method of its service. Methods: {known}.")
