"""Floor 4: the gRPC door: one interceptor for all four kinds, one cached wrapper per method.

Both stages of the pipeline stand here, one after the other. List an interceptor that authenticates *before*
this one, so that it has spoken when limits and keys are asked for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import descriptor_pool

from grpc_interceptors.method import Handler, Method
from grpc_interceptors.options import MethodPolicies
from grpc_interceptors.serving import carried
from grpc_interceptors.wrapping import wrap
from resilience.errors import ConfigurationError
from resilience.pipeline import Pipeline

EXEMPT = frozenset(
    {
        "envoy.service.ratelimit.v3.RateLimitService",
        "grpc.channelz.v1.Channelz",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)
"""Services that no policy touches: who probes or debugs must get through, most of all when the service is busy, and
a gateway that asks for others has no quota of its own."""

_MOST_METHODS = 4096  # A generic handler may answer any name, so the cache is bounded.

# Not the loop's own pool: there, handlers that wait for a store would keep its look-up of a host name from a thread.
_THREADS = 32


class ResilienceInterceptor(grpc.aio.ServerInterceptor):
    """Guards a ``grpc.aio`` server: ``grpc.aio.server(interceptors=[..., ResilienceInterceptor(pipeline)])``.

    A method is also held to what its .proto declares beside it, with ``(resilience.v1.policy)``. Precedence, for limits
    and for keys each on its own: the decorator at the handler, else that option, else the pipeline. Limits add to the
    pipeline's; of a key's policies the first of these holds it, and one that any requires stays required.

    Import the ``_pb2`` modules of the services first: their options are checked here. Those of a module that is
    imported later are checked at a method's first call; if they can't be honoured, its calls fail with INTERNAL.

    Args:
        pipeline: the policies.
        executor: where handlers that are plain functions run, one thread for each RPC; by default up to 32 threads.
        before_body: ask the policies before the message of a unary request has come, so that a refused client need not
            send it, and one that never sends it is counted all the same. A policy that looks into the payload waits
            for it. To interceptors listed before this one, such a method takes a stream of requests.

    Raises:
        ConfigurationError: a policy names a method that its service does not have, or a method's option can't be
            honoured.
    """

    def __init__(self, pipeline: Pipeline, executor: Executor | None = None, *, before_body: bool = False) -> None:
        self._pipeline = pipeline
        self._executor = executor or ThreadPoolExecutor(_THREADS, "resilience-grpc")
        self._before_body = before_body
        self._on_loop = False
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}
        for operation in pipeline.operations():
            _verify(operation)
        self._policies = MethodPolicies()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Coroutine[Any, Any, Handler | None]:
        """Return the guarded handler, to be awaited; an unknown method stays unknown, and no policy hears of it.

        Raises:
            ConfigurationError: the server is not one of ``grpc.aio``.
        """
        if not self._on_loop:
            self._on_loop = _check_loop()
        return self._guarded(continuation, handler_call_details)

    async def _guarded(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        name: str = handler_call_details.method
        known = self._wrapped.get(name)
        if known is not None and known[0] is handler:
            carried.set(handler_call_details.invocation_metadata)
            return known[1]
        if handler is None or name[1:].partition("/")[0] in EXEMPT:
            return handler
        carried.set(handler_call_details.invocation_metadata)
        method = Method.of(name, handler, self._policies)
        wrapped = wrap(method, handler, self._pipeline, self._executor, before_body=self._before_body)
        if len(self._wrapped) < _MOST_METHODS:
            self._wrapped[name] = (handler, wrapped)
        return wrapped


def _check_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "ResilienceInterceptor guards servers of grpc.aio.server(...), and this one is of grpc.server(...). "
            "Serve with grpc.aio.server; plain functions as handlers run there, too."
        ) from None
    return True


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
