"""Floor 4: what a call to another service carries: the running call's ids, what is left of its deadline, a key.

Four classes behind one function: grpc registers a class that intercepts several kinds for the first of them only.
"""

from collections.abc import Callable, Iterable
from secrets import token_hex
from typing import Any

import grpc
from grpc.aio import ClientCallDetails, Metadata

from resilience import wire
from resilience.context import get_request_context, get_tracing_headers

_NOTHING_LEFT = "The deadline of the call that makes this one has passed"


def client_interceptors(
    *, keyed: Iterable[str] = (), margin: float = 0.0, mint: Callable[[], str] = token_hex
) -> list[grpc.aio.ClientInterceptor]:
    """Return what ``grpc.aio.insecure_channel(target, interceptors=...)`` takes, for all four kinds of call.

    Ids and trace context of the running call travel as metadata; what the application sets itself wins. A call that has
    less time left than its own timeout gets that; one that has none left fails with DEADLINE_EXCEEDED before it leaves.

    Args:
        keyed: full names of unary methods (``"/pkg.Service/Method"``) that get an idempotency key: one for each call
            of the application, so that all of gRPC's own retries of it carry the same.
        margin: seconds kept back of what is left, at least 0, so that the answer arrives in time to be used.
        mint: makes a key.
    """
    outgoing = _Outgoing(frozenset(keyed), margin, mint)
    return [_UnaryUnary(outgoing), _UnaryStream(outgoing), _StreamUnary(outgoing), _StreamStream(outgoing)]


class _Outgoing:
    """Adds to one call's details."""

    def __init__(self, keyed: frozenset[str], margin: float, mint: Callable[[], str]) -> None:
        self._keyed = keyed
        self._margin = margin
        self._mint = mint

    def details(self, details: ClientCallDetails) -> ClientCallDetails:
        """Return new details: the caller's own are never changed.

        Raises:
            grpc.aio.AioRpcError: nothing is left of the deadline.
        """
        pairs: list[tuple[str, Any]] = list(details.metadata or ())
        names = {name for name, _ in pairs}
        pairs += [pair for pair in get_tracing_headers().items() if pair[0] not in names]
        if self._keyed and _name(details) in self._keyed and wire.IDEMPOTENCY_KEY not in names:
            pairs.append((wire.IDEMPOTENCY_KEY, self._mint()))
        return ClientCallDetails(
            details.method,
            self._timeout(details.timeout),
            Metadata(*pairs),
            details.credentials,
            details.wait_for_ready,
        )

    def _timeout(self, own: float | None) -> float | None:
        left = get_request_context().remaining()
        if left is None:
            return own
        left -= self._margin
        if left <= 0:
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, Metadata(), Metadata(), details=_NOTHING_LEFT)
        return left if own is None else min(own, left)


def _name(details: ClientCallDetails) -> str:
    method: Any = details.method
    return method.decode() if isinstance(method, bytes) else method


class _Kind:
    def __init__(self, outgoing: _Outgoing) -> None:
        self._outgoing = outgoing


class _UnaryUnary(_Kind, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._outgoing.details(client_call_details), request)


class _UnaryStream(_Kind, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._outgoing.details(client_call_details), request)


class _StreamUnary(_Kind, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self._outgoing.details(client_call_details), request_iterator)


class _StreamStream(_Kind, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self._outgoing.details(client_call_details), request_iterator)
