"""Every style of handler that acts in every way, as a process of its own: ``python -m ... asyncio|uvloop``.

Prints its port, serves until its standard input ends, then prints as JSON what became of every call. All that is
written to standard error is one JSON list for each record of the log; anything else there is an accident.
"""

import asyncio
import contextlib
import gc
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import grpc
import uvloop

from grpc_interceptors import ResilienceInterceptor, add_health
from resilience import HealthChecker, IdempotencyPolicy, MemoryStore, Pipeline, RateLimitPolicy
from tests.e2e.grpc_matrix_acts import ACTS, World
from tests.e2e.grpc_matrix_styles import STYLES, Act, path
from tests.integration.grpc_world import generic

_BOUND = 20.0  # Seconds that any one wait may take.


def handlers(world: World) -> dict[str, Any]:
    """Return every handler by its name."""

    def bound(act: Callable[[World, Any], Any]) -> Act:
        return lambda context: act(world, context)

    return {
        path(name, act, early=early): getattr(grpc, f"{style.kind}_rpc_method_handler")(
            style.make(bound(acts[style.sync]), early)
        )
        for name, style in STYLES.items()
        for act, acts in ACTS.items()
        for early in (False, True)
    }


def control(world: World) -> dict[str, Any]:
    """Return what the client steers by: each takes a correlation id."""

    async def look(request: bytes, context: Any) -> bytes:
        life = world.life(request.decode())
        what = dict(context.invocation_metadata())["x-look"]
        if what == "release":
            life.release()
        elif what != "runs":
            await asyncio.wait_for(getattr(life, what).wait(), _BOUND)
        return str(life.runs).encode()

    return {"/matrix.Control/Look": grpc.unary_unary_rpc_method_handler(look)}


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        correlation_id = record.__dict__.get("correlation_id")
        return json.dumps([record.levelname, record.name, record.getMessage(), correlation_id, error])


async def main() -> None:
    """Serve, and report."""
    world, store = World(), MemoryStore()
    pipeline = Pipeline([world, RateLimitPolicy(store, "1000000/minute"), IdempotencyPolicy(store)])
    server = grpc.aio.server(interceptors=[ResilienceInterceptor(pipeline)])
    server.add_generic_rpc_handlers(generic({**handlers(world), **control(world)}))
    checker = HealthChecker()
    add_health(server, checker)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(5)
    drained = await pipeline.drained(5)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(world.quiet.wait(), 5)
    gc.collect()  # what nobody retrieved says so when it goes
    left = [repr(task) for task in asyncio.all_tasks() - {asyncio.current_task()}]
    ended = {name: life.ended for name, life in world.lives.items()}
    print(json.dumps({"open": world.open, "drained": drained, "left": left, "ended": ended}), flush=True)


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[1] == "uvloop" else None) as runner:
        runner.run(main())
