"""What each policy adds to a call on the memory store: process CPU, in one run, interleaved, best of many rounds.

Run it with ``.venv/bin/python -m benchmarks.layers``. The first line of each table is the bare baseline.
"""

import asyncio
import platform
from collections.abc import Awaitable, Callable
from time import process_time

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.report import Row, Section, Table
from http_middleware import ResilienceMiddleware, install
from http_middleware.routes import RouteTable
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, RateLimitPolicy, Selective

ROUNDS, CALLS = 40, 500
HEADERS = [
    (b"host", b"bench"),
    (b"user-agent", b"bench/1"),
    (b"accept", b"*/*"),
    (b"content-type", b"application/json"),
    (b"content-length", b"2"),
    (b"x-api-key", b"somebody"),
    (b"x-correlation-id", b"0af7651916cd43dd8448eb211c80319c"),
]


def scope() -> Scope:
    """Return a fresh request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": "POST",
        "path": "/things",
        "raw_path": b"/things",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": HEADERS,
        "client": ("127.0.0.1", 5000),
        "server": ("127.0.0.1", 80),
    }


async def raw(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer as the smallest ASGI application does."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


async def receive() -> Message:
    """Give an empty object."""
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def send(_message: Message) -> None:
    """Take whatever comes."""


def pipelines() -> dict[str, Pipeline]:
    """Return what is measured, from nothing to everything."""
    store = MemoryStore()
    limit = RateLimitPolicy(store, "1000000000/minute")
    keyed = Selective(IdempotencyPolicy(store), ["POST /things"])
    return {
        "an empty pipeline": Pipeline(edge=()),
        "request context": Pipeline(),
        "rate limit": Pipeline([limit], edge=()),
        "all: context, limit, keys (none sent)": Pipeline([limit, keyed]),
    }


def fastapi_app(pipeline: Pipeline | None) -> FastAPI:
    """Return one FastAPI route, guarded or bare."""
    app = FastAPI()

    @app.post("/things")
    async def make() -> dict[str, str]:
        return {}

    if pipeline is not None:
        install(app, pipeline)
    return app


def candidates() -> dict[str, dict[str, ASGIApp]]:
    """Return the tables to measure."""
    routes = RouteTable(fastapi_app(None).routes)  # the raw application has no table of its own
    guarded = {name: ResilienceMiddleware(raw, one, routes=routes) for name, one in pipelines().items()}
    everything = list(pipelines().values())[-1]
    return {
        "over a raw ASGI application": {"raw application": raw, **guarded},
        "over a FastAPI route": {"bare route": fastapi_app(None), "all, by install()": fastapi_app(everything)},
    }


async def best(apps: dict[str, ASGIApp], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the least CPU microseconds a call of each, measured in turns so that noise hits all alike."""
    least = dict.fromkeys(apps, float("inf"))
    for _ in range(rounds):
        for name, app in apps.items():
            least[name] = min(least[name], await _round(app))
    return least


async def _round(app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> float:
    started = process_time()
    for _ in range(CALLS):
        await app(scope(), receive, send)
    return (process_time() - started) / CALLS * 1e6


async def run(*, quick: bool) -> Section:
    """Measure, for a report."""
    tables = []
    for title, apps in candidates().items():
        figures = await best(apps, 15 if quick else ROUNDS)
        base = next(iter(figures.values()))
        rows = [Row(name, (figure, figure - base, figure / base)) for name, figure in figures.items()]
        tables.append(Table(f"Each policy {title}, in memory", ("CPU µs", "added", "x bare"), tuple(rows)))
    return Section("Policies", tuple(tables), {})


async def main() -> None:
    """Measure and print."""
    print(f"CPU microseconds a call; Python {platform.python_version()}, {platform.machine()}\n")
    for title, apps in candidates().items():
        print(f"{title:44}{'us':>8}{'added':>8}{'ratio':>8}")
        figures = await best(apps)
        base = next(iter(figures.values()))
        for name, figure in figures.items():
            print(f"  {name:42}{figure:8.1f}{figure - base:8.1f}{base / figure:8.2f}")
        print()


if __name__ == "__main__":
    asyncio.run(main())
