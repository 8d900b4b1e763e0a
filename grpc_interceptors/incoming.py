"""Floor 4: requests that may come late or never: a message that nobody waits for yet, and a stream nobody wants."""

import asyncio
from contextlib import aclosing
from typing import Any

import grpc

from grpc_interceptors.malformed import MalformedRequestError, missing

_DRAIN_SECONDS, _DRAIN_MESSAGES = 0.1, 100

_LEAVING_SECONDS = 0.1

_NOT_YET = object()


class Incoming:
    """The one message of a unary request, read when it is first asked for: by then the metadata may have decided.

    Args:
        context: the servicer context of a method that is served as a stream of requests.
    """

    __slots__ = ("_context", "_message")

    def __init__(self, context: Any) -> None:
        self._context = context
        self._message: Any = _NOT_YET

    async def message(self) -> Any:
        """Return the message; waits for it the first time. Raises ``MalformedRequestError`` where none comes."""
        if self._message is _NOT_YET:
            message = await self._context.read()
            if message is grpc.aio.EOF:
                await let_leave()
                raise missing()
            self._message = message
        return self._message


async def let_leave() -> None:
    """Wait for the cancellation of a client that left, which grpc tells just after its other signs: raises it."""
    await asyncio.sleep(_LEAVING_SECONDS)


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
