"""Floor 4: requests that may come late or never: a message that nobody waits for yet, and a stream nobody wants."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import Any, Self

import grpc

from grpc_interceptors.context import GuardedContext
from grpc_interceptors.malformed import MalformedRequestError, missing

_DRAIN_SECONDS, _DRAIN_MESSAGES = 0.1, 100

_NOT_YET = object()


class Incoming:
    """The one message of a unary request, read when it is first asked for: by then the metadata may have decided.

    Args:
        context: of a method that is served as a stream of requests.
    """

    __slots__ = ("_context", "_message")

    def __init__(self, context: GuardedContext) -> None:
        self._context: GuardedContext | None = context
        self._message: Any = _NOT_YET

    async def message(self) -> Any:
        """Return the message; waits for it the first time.

        Raises:
            MalformedRequestError: the client ended its side without one.
        """
        if self._message is _NOT_YET:
            message = await self._context.read() if self._context is not None else grpc.aio.EOF
            if message is grpc.aio.EOF:
                raise missing()
            self._message = message
            self.drop()
        return self._message

    def drop(self) -> None:
        """Read no more. The context keeps the call, which keeps this: a circle while this keeps the context."""
        self._context = None


class Requests:
    """A request stream that ends when its client says so, and never because the client left.

    Args:
        requests: the stream, as grpc or an interceptor further out made it.
        context: of its RPC.
    """

    __slots__ = ("_context", "_reading", "_requests")

    def __init__(self, requests: AsyncIterable[Any], context: GuardedContext) -> None:
        self._requests = requests
        self._context = context
        self._reading: AsyncIterator[Any] | None = None  # grpc's own warns if it is made and never read

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._reading is None:
            self._reading = aiter(self._requests)
        try:
            return await anext(self._reading)
        except StopAsyncIteration:
            await self._context.confirm_end()
            raise

    async def aclose(self) -> None:
        """Read no more of it."""
        close = getattr(self._reading, "aclose", None)
        if close is not None:
            await close()


async def drain(requests: Any) -> None:
    """Read what a client still sends, for a moment.

    The aio client of Python reports INTERNAL, without a trailer, where a stream is refused while it writes.
    """
    try:
        async with asyncio.timeout(_DRAIN_SECONDS), aclosing(aiter(requests)) as rest:
            seen = 0
            async for _ in rest:
                seen += 1
                if seen == _DRAIN_MESSAGES:
                    return
    except (TimeoutError, MalformedRequestError):
        return
