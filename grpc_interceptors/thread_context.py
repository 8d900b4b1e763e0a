"""Floor 4: what a handler in a thread is given: the methods of ``grpc.ServicerContext``, and requests to iterate."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import grpc
from grpc.aio import AbortError

from grpc_interceptors.trailers import Trailers

if TYPE_CHECKING:
    from grpc_interceptors.bridge import Bridge

_END = object()


class ThreadContext:
    """The ``grpc.ServicerContext`` of a handler in a thread.

    Facts
    - ``abort`` raises in the thread, and the status leaves once the handler has ended.
    - Once the client is gone, ``is_active()`` is False; requests, replies and initial metadata raise ``RpcError``.
    - Called on the event loop, as by an ``async`` function behind a plain one, it is a ``grpc.aio.ServicerContext``.
    """

    __slots__ = ("_context", "_rpc")

    def __init__(self, rpc: "Bridge") -> None:
        self._rpc = rpc
        self._context = rpc.context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers = ()) -> Any:
        """End the RPC with ``code``. Always raises."""
        if self._rpc.is_here():
            return self._context.abort(code, details, trailing_metadata)
        self._rpc.ending = (code, details, tuple(trailing_metadata))
        raise AbortError(details)

    def abort_with_status(self, status: grpc.Status) -> Any:
        """End the RPC with a rich status. Always raises."""
        return self.abort(status.code, status.details, status.trailing_metadata or ())

    def cancel(self) -> None:
        """End the RPC with CANCELLED, at once; the handler runs on."""
        self._rpc.do(self._rpc.cancel)

    def is_active(self) -> bool:
        """Tell whether the RPC is not over yet."""
        return not self._rpc.over and self._context.is_alive()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have ``callback`` called once the RPC is over, on the event loop, so that it must not block.

        Returns False where the RPC is over already; then nobody calls it.
        """

        def register() -> bool:
            if self.is_active():
                self._context.add_done_callback(lambda _context: callback())
            return self.is_active()

        registered: bool = self._rpc.do(register)
        return registered

    def time_remaining(self) -> float | None:
        """Return the seconds until the client's deadline, or None where it set none; 0 once the RPC is over."""
        if self._rpc.deadline is None:
            return None
        return max(0.0, self._rpc.deadline - monotonic()) if self.is_active() else 0.0

    def send_initial_metadata(self, initial_metadata: Trailers) -> Any:
        """Send the initial metadata now. After it, the client doesn't retry by itself."""
        send = partial(self._context.send_initial_metadata, tuple(initial_metadata))
        return send() if self._rpc.is_here() else self._rpc.ask(send)

    def peer_identities(self) -> Any:
        """Return the peer's identities, or None."""
        return self._rpc.do(self._context.peer_identities)

    def peer_identity_key(self) -> Any:
        """Return the name of the property that identifies the peer, or None."""
        return self._rpc.do(self._context.peer_identity_key)

    def auth_context(self) -> Mapping[str, Any]:
        """Return the properties of the peer's authentication."""
        found: Mapping[str, Any] = self._rpc.do(self._context.auth_context)
        return found


class ThreadRequests:
    """The request stream, for a thread: each step waits for one message. Async iterable on the loop."""

    __slots__ = ("_requests", "_rpc")

    def __init__(self, rpc: "Bridge", requests: Any) -> None:
        self._rpc = rpc
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            message = self._rpc.ask(self._next)
        except grpc.RpcError:
            if not self._rpc.finished:
                raise
            message = _END  # a thread of the handler's own, which the handler did not wait for
        if message is _END:
            raise StopIteration
        return message

    def __aiter__(self) -> AsyncIterator[Any]:
        found: AsyncIterator[Any] = aiter(self._requests)
        return found

    async def _next(self) -> Any:
        if not hasattr(self._requests, "__anext__"):
            self._requests = aiter(self._requests)
        return await anext(self._requests, _END)
