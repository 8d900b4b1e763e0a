"""Handlers that outlive their RPC and still use its context, each in a process of its own: ``python FILE SCENARIO``.

A context that is used too late ends not in an exception but in a dead process, so what is tested is the exit code.
Prints what was seen.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

from resilience import IdempotencyPolicy, MemoryStore, Pipeline
from tests.integration.grpc_world import GO, Pair, ask, serving, start

KEY: Pair = ("idempotency-key", "key-1")
SENT: Pair = ("x-sent", "by the client")


def look(context: Any) -> tuple[Any, ...]:
    """Read everything that a context tells."""
    address, _, _ = context.peer().rpartition(":")
    remaining = context.time_remaining()
    context.peer_identities()
    context.peer_identity_key()
    context.auth_context()
    return address, dict(context.invocation_metadata()).get("x-sent"), remaining is None or remaining >= 0


def speak(context: Any) -> None:
    """Tell a context everything that can be told without waiting."""
    context.set_trailing_metadata((("x-app", "late"),))
    context.set_code(grpc.StatusCode.NOT_FOUND)
    context.set_details("Late")


class Life:
    """The life of one RPC, beside the one of its handler."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.over = asyncio.Event()
        self.found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.pipeline = Pipeline([IdempotencyPolicy(MemoryStore())])
        self.tasks: set[asyncio.Task[None]] = set()

    def begin(self, context: Any) -> None:
        """Say that the handler runs, and have it said when the RPC is over."""
        context.add_done_callback(lambda _context: self.over.set())
        self.running.set()

    async def late(self, context: Any) -> None:
        """Use the context once the RPC is over."""
        await self.over.wait()
        await asyncio.sleep(0)
        seen = look(context)
        speak(context)
        self.found.set_result(seen)

    def leave_behind(self, context: Any) -> asyncio.Task[None]:
        self.tasks.add(task := asyncio.create_task(self.late(context)))
        return task

    def serving(self, handle: Any, kind: str = "unary_unary") -> AbstractAsyncContextManager[grpc.aio.Channel]:
        return serving(getattr(grpc, f"{kind}_rpc_method_handler")(handle), pipeline=self.pipeline)

    async def leave(self, call: Any) -> None:
        """Cancel ``call`` while its handler runs, and wait until the server is done with it."""
        await self.running.wait()
        call.cancel()
        await self.over.wait()


async def keyed_looks(life: Life) -> None:
    """A keyed handler's client cancels; the handler looks at its context and sets trailers."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        await life.over.wait()
        seen = look(context)
        context.set_trailing_metadata((("x-app", "late"),))
        life.found.set_result(seen)
        return b"done"

    async with life.serving(handle) as channel:
        await life.leave(start(channel, GO, "unary_unary", KEY, SENT))
        print(await life.found, await life.pipeline.drained(5))
        end = await ask(channel, GO, "unary_unary", KEY)
        print(end.code.name, end.replies, end.get("x-app"))


async def keyed_looks_after_its_deadline(life: Life) -> None:
    """As before, but the client's deadline passes."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        await life.late(context)
        return b"done"

    async with life.serving(handle) as channel:
        end = await ask(channel, GO, "unary_unary", KEY, SENT, deadline=0.2)
        print(end.code.name, await life.found, await life.pipeline.drained(5))


async def keyed_aborts(life: Life) -> None:
    """A keyed handler's client cancels; the handler aborts."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        await life.over.wait()
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "Late", (("x-app", "late"),))
        return b""

    async with life.serving(handle) as channel:
        await life.leave(start(channel, GO, "unary_unary", KEY))
        print(await life.pipeline.drained(5))
        end = await ask(channel, GO, "unary_unary", KEY)
        print(end.code.name, end.details, end.get("x-app"))


async def keyed_crashes(life: Life) -> None:
    """A keyed handler's client cancels; the handler raises."""
    runs: list[int] = []

    async def handle(_request: bytes, context: Any) -> bytes:
        runs.append(1)
        if len(runs) > 1:
            return b"done"
        life.begin(context)
        await life.over.wait()
        raise ValueError

    async with life.serving(handle) as channel:
        await life.leave(start(channel, GO, "unary_unary", KEY))
        print(await life.pipeline.drained(5))
        print((await ask(channel, GO, "unary_unary", KEY)).code.name, len(runs))


async def keyed_uses_the_rest(life: Life) -> None:
    """A keyed handler's client cancels; the handler uses what is passed on to the real context."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        await life.over.wait()
        await attempt(context.cancelled)
        await attempt(context.done)
        await attempt(context.disable_next_message_compression)
        await attempt(lambda: context.set_compression(grpc.Compression.Gzip))
        await attempt(lambda: context.add_done_callback(lambda _context: None))
        await attempt(lambda: context.send_initial_metadata((("x-app", "late"),)))
        await attempt(lambda: context.write(b"late"))
        return b"done"

    async with life.serving(handle) as channel:
        await life.leave(start(channel, GO, "unary_unary", KEY))
        print(await life.pipeline.drained(5))
        print((await ask(channel, GO, "unary_unary", KEY)).code.name)


async def keyed_leaves_a_task_behind(life: Life) -> None:
    """A keyed handler replies; a task that it left behind looks at its context."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        life.leave_behind(context)
        return b"done"

    async with life.serving(handle) as channel:
        await ask(channel, GO, "unary_unary", KEY, SENT)
        print(await life.found)


async def leaves_a_task_behind(life: Life) -> None:
    """A handler replies; a task that it left behind looks at its context."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        life.leave_behind(context)
        return b"done"

    async with life.serving(handle) as channel:
        await ask(channel, GO, "unary_unary", SENT)
        print(await life.found)


async def shields_its_work(life: Life) -> None:
    """A handler without a key is cut; the task that it shields looks at its context."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        await asyncio.shield(life.leave_behind(context))
        return b"done"

    async with life.serving(handle) as channel:
        await life.leave(start(channel, GO, "unary_unary", SENT))
        print(await life.found)


async def swallows_its_cancellation(life: Life) -> None:
    """A handler swallows its cancellation, and looks at its context."""

    async def handle(_request: bytes, context: Any) -> bytes:
        life.begin(context)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen = look(context)
            speak(context)
            life.found.set_result(seen)
        return b"done"

    async with life.serving(handle) as channel:
        await life.leave(start(channel, GO, "unary_unary", SENT))
        print(await life.found)


async def generator_cleans_up(life: Life) -> None:
    """A generator that is cut while it writes looks at its context in its ``finally``."""

    async def handle(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        life.begin(context)
        try:
            while True:
                yield b"x" * 100_000
        finally:
            seen = look(context)
            speak(context)
            life.found.set_result(seen)

    async with life.serving(handle, "unary_stream") as channel:
        call = start(channel, GO, "unary_stream", SENT)
        await call.read()
        await life.leave(call)
        print(await life.found)


async def callback_looks(life: Life) -> None:
    """A done callback looks at the context that it is handed."""

    async def handle(_request: bytes, context: Any) -> bytes:
        context.add_done_callback(lambda done: life.found.set_result(look(done)))
        life.begin(context)
        await asyncio.Event().wait()
        return b""

    async with life.serving(handle) as channel:
        await life.leave(start(channel, GO, "unary_unary", SENT))
        print(await life.found)


async def attempt(use: Callable[[], object]) -> None:
    """Use a dead RPC in a way that may raise, as it does without us."""
    try:
        result = use()
        if isinstance(result, Awaitable):
            await result
    except (grpc.aio.BaseError, grpc.RpcError, RuntimeError):
        pass


async def main(scenario: str) -> None:
    await globals()[scenario](Life())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
