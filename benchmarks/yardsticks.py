"""The least that a middleware can do, as rows beside ours: what no guard can be cheaper than. Not for use."""

import os
from collections.abc import Awaitable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

WRAPPED_SEND = "yardstick: a send wrapped, nothing else"
UNCHECKED_IDS = "yardstick: ids in and out, unchecked"

_ids: ContextVar[tuple[bytes, bytes] | None] = ContextVar("benchmarks_ids", default=None)


def wrapped_send(app: ASGIApp) -> ASGIApp:
    """Return the application with every message of its replies looked at."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        def pass_on(message: Message) -> Awaitable[None]:
            return send(message)

        await app(scope, receive, pass_on)

    return guarded


def unchecked_ids(app: ASGIApp) -> ASGIApp:
    """Return the application with the caller's id kept, one minted, both in a context variable and in the reply.

    As short as it can be written: no id is checked, none goes into an error's answer, no policy can be asked.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        minted = os.urandom(16).hex().encode()
        sent = minted
        for name, value in scope["headers"]:
            if name == b"x-correlation-id":
                sent = value
        ids = ((b"x-request-id", minted), (b"x-correlation-id", sent))

        def add(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ids]
            return send(message)

        token = _ids.set((minted, sent))
        try:
            await app(scope, receive, add)
        finally:
            _ids.reset(token)

    return guarded


YARDSTICKS = {WRAPPED_SEND: wrapped_send, UNCHECKED_IDS: unchecked_ids}
