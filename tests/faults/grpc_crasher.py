"""A server whose handlers use their context after their RPC: ``python -m tests.faults.grpc_crasher SITE bare|guarded``.

Prints its port, then what was seen of the dead RPC, and ends when its standard input does.
"""

import asyncio
import contextlib
import resource
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc

from grpc_interceptors import ResilienceInterceptor
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, RateLimitPolicy
from tests.integration.grpc_world import GO, SERVICE, generic

AGAIN = f"/{SERVICE}/Again"
_TURNS = 20  # Turns of the loop after which grpc has freed the RPC for sure.


class Scene:
    """One RPC of a client in another process, and what its handler sees of it when it is over."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        self.seen: asyncio.Future[str] = self.loop.create_future()
        self.tasks: set[asyncio.Task[None]] = set()

    async def turns(self) -> None:
        await self.over.wait()
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    def look(self, context: Any) -> str:
        """Ask a context whose RPC is over who called."""
        seen: str = context.peer().rpartition(":")[0]
        self.loop.call_soon_threadsafe(self.seen.set_result, seen)
        return seen

    def listen(self, context: Any) -> None:
        context.add_done_callback(lambda _context: self.over.set())

    async def late(self, context: Any) -> None:
        await self.turns()
        self.look(context)

    def leave_behind(self, context: Any) -> asyncio.Task[None]:
        self.tasks.add(task := asyncio.create_task(self.late(context)))
        return task


def plain_function(scene: Scene) -> Any:
    """A plain function works on when its client's deadline has passed."""

    def handle(_request: bytes, context: Any) -> bytes:
        gone, left = threading.Event(), context.time_remaining()
        context.add_callback(gone.set)
        gone.wait(left + 0.2)  # a bare context never calls back
        scene.loop.call_soon_threadsafe(scene.over.set)
        asyncio.run_coroutine_threadsafe(scene.turns(), scene.loop).result(10)
        return scene.look(context).encode()

    return grpc.unary_unary_rpc_method_handler(handle)


def background_task(scene: Scene) -> Any:
    """A handler replies and leaves a task behind."""

    async def handle(_request: bytes, context: Any) -> bytes:
        scene.listen(context)
        scene.leave_behind(context)
        return b"done"

    return grpc.unary_unary_rpc_method_handler(handle)


def shielded_work(scene: Scene) -> Any:
    """A handler is cut, and the work that it shields isn't."""

    async def handle(_request: bytes, context: Any) -> bytes:
        scene.listen(context)
        await asyncio.shield(scene.leave_behind(context))
        return b"done"

    return grpc.unary_unary_rpc_method_handler(handle)


def keyed_work(scene: Scene) -> Any:
    """A keyed handler survives its client."""

    async def handle(_request: bytes, context: Any) -> bytes:
        scene.listen(context)
        await scene.late(context)
        return b"done"

    return grpc.unary_unary_rpc_method_handler(handle)


def generator_in_a_write(scene: Scene) -> Any:
    """A generator that is cut while its reply is written looks in its ``finally``."""

    async def handle(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 100_000
        finally:
            scene.look(context)

    return grpc.unary_stream_rpc_method_handler(handle)


SITES = {
    site.__name__: site for site in (plain_function, background_task, shielded_work, keyed_work, generator_in_a_write)
}


async def _again(_request: bytes, _context: Any) -> bytes:
    return b"done"


async def main(site: str, guard: str) -> None:
    """Serve one site."""
    scene, store = Scene(), MemoryStore()
    pipeline = Pipeline([RateLimitPolicy(store, "100/minute"), IdempotencyPolicy(store)])
    server = grpc.aio.server(interceptors=[ResilienceInterceptor(pipeline)] if guard == "guarded" else [])
    server.add_generic_rpc_handlers(
        generic({GO: SITES[site](scene), AGAIN: grpc.unary_unary_rpc_method_handler(_again)})
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    with contextlib.suppress(TimeoutError):
        print(await asyncio.wait_for(scene.seen, 10), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)
    print(await pipeline.drained(5), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asyncio.run(main(sys.argv[1], sys.argv[2]))
