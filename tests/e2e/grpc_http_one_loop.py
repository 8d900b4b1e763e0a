"""Both doors, their servers and their clients in one process and one loop: ``python -m ... asyncio|uvloop``.

Prints as JSON which loop it was, and how often each outcome was seen.
"""

import asyncio
import json
import sys
from collections import Counter
from typing import Any

import uvloop
from fastapi import FastAPI

from http_middleware import ResilienceMiddleware
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, RateLimitPolicy, get_correlation_id
from tests.integration.grpc_world import GO, STYLES, SYNC_STYLES, Style, SyncStyle, ask, connected, make_server
from tests.integration.http_driver import dial, serving

RPCS, REQUESTS = 100, 50
HANDLERS: dict[str, Style | SyncStyle] = {
    **{f"{GO}_{name}": style for name, style in STYLES.items()},
    **{f"{GO}_plain_{name}": style for name, style in SYNC_STYLES.items()},
}


async def main() -> None:
    """Ask both doors at the same time."""
    store = MemoryStore()
    pipeline = Pipeline([RateLimitPolicy(store, f"{RPCS + REQUESTS}/hour"), IdempotencyPolicy(store)])
    app = FastAPI()
    app.add_middleware(ResilienceMiddleware, pipeline=pipeline)

    @app.post("/go")
    async def go() -> str:
        return str(get_correlation_id())

    def handler(style: Style | SyncStyle) -> Any:
        async def act(_context: Any) -> bytes:
            await asyncio.sleep(0)
            return str(get_correlation_id()).encode()

        def sync_act(_context: Any) -> bytes:
            return str(get_correlation_id()).encode()

        return style.make(act) if isinstance(style, Style) else style.make(sync_act)

    server = make_server(pipeline, {name: handler(style) for name, style in HANDLERS.items()})
    async with serving(app, loop="none") as port, dial(port) as http, connected(server) as channel:

        async def call(n: int) -> str:
            name = list(HANDLERS)[n % len(HANDLERS)]
            end = await ask(channel, name, HANDLERS[name].kind, ("x-correlation-id", f"rpc-{n}"))
            same = end.replies == [f"rpc-{n}".encode()] and end.get("x-correlation-id") == f"rpc-{n}"
            return f"gRPC {end.code.name} {same}"

        async def post(n: int) -> str:
            reply = await http.post("/go", headers={"x-correlation-id": f"http-{n}"})
            same = reply.json() == reply.headers["x-correlation-id"] == f"http-{n}"
            return f"HTTP {reply.status_code} {same}"

        ends = await asyncio.gather(*map(call, range(RPCS)), *map(post, range(REQUESTS)))
        over = await ask(channel, next(iter(HANDLERS)))
        denied = await http.post("/go")
    loop = type(asyncio.get_running_loop()).__module__.split(".")[0]
    last = [over.code.name, denied.status_code]
    print(json.dumps({"loop": loop, "ends": Counter(ends), "over": last, "drained": await pipeline.drained(1)}))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[1] == "uvloop" else None) as runner:
        runner.run(main())
