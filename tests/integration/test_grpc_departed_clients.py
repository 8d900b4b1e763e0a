"""What a client leaves behind that goes while its handler is on its way from a thread to the loop."""

import asyncio
import gc
import threading
from typing import Any

import pytest

from tests.integration.grpc_world import GO, STYLES, Witness, ok, serving, start


@pytest.mark.parametrize("name", STYLES)
async def test_an_async_handler_behind_a_plain_decorator_never_begins_once_its_client_left(name: str) -> None:
    style, witness, loop = STYLES[name], Witness(), asyncio.get_running_loop()
    entered, gate, left = asyncio.Event(), threading.Event(), threading.Event()
    began: list[Any] = []

    async def act(context: Any) -> bytes:
        began.append(context)
        return await ok(context)

    handler = style.make(act)
    inner = getattr(handler, style.kind)

    def decorated(request: Any, context: Any) -> Any:
        loop.call_soon_threadsafe(entered.set)
        assert gate.wait(10)
        try:
            return inner(request, context)
        finally:
            left.set()

    async with serving(handler._replace(**{style.kind: decorated}), witness) as channel:
        call = start(channel, GO, style.kind)
        if style.kind.startswith("stream_"):
            await call.done_writing()
        await entered.wait()
        call.cancel()
        assert (await witness.outcomes.get()).ended == "cancelled"
        gate.set()
        assert await asyncio.to_thread(left.wait, 10)
    gc.collect()  # a coroutine that nobody awaited says so when it goes, and a warning is an error
    assert began == []
