"""uvicorn as a server of ``run``, and what it says on connections that will soon close."""

import asyncio
import gc
import signal
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from http_middleware import install
from http_middleware.health import HealthApp
from http_middleware.server import UvicornServer
from resilience import ConfigurationError, HealthChecker, MemoryStore, Pipeline, RateLimitPolicy
from resilience.lifecycle import run
from tests.integration.http_driver import Wire, connect, http_scope

BOUND = 10.0


def build(checker: HealthChecker | None = None, **options: Any) -> FastAPI:
    app = FastAPI(**options)

    @app.get("/")
    async def root(response: Response) -> str:
        response.headers["connection"] = "keep-alive"
        return "served"

    install(app, Pipeline(), health=checker)
    return app


@asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[tuple[UvicornServer, httpx.AsyncClient]]:
    server = UvicornServer(app, port=0, log_config=None, **options)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
            yield server, client
    finally:
        await asyncio.wait_for(server.stop(0), BOUND)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_it_serves_once_started_and_its_port_is_free_once_stopped() -> None:
    async with serving(build()) as (server, client):
        assert (await client.get("/")).json() == "served"
    assert not listens(server.port)
    await asyncio.wait_for(server.wait_for_termination(), BOUND)


async def test_a_taken_port_stops_the_start_and_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigurationError, match=rf"^HTTP_PORT: port {port} can't be used \(Address already in use"
        ):
            await UvicornServer(build(), port=port, name="HTTP_PORT").start()


async def test_a_port_that_is_taken_between_bind_and_listen_is_named_and_the_application_ends() -> None:
    seen: list[str] = []
    rival = socket.socket()
    rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    rival.bind(("127.0.0.1", 0))
    port = rival.getsockname()[1]

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        rival.listen()
        yield
        seen.append("ended")

    with rival, pytest.raises(ConfigurationError, match=f"HTTP: port {port} can't be used"):
        await UvicornServer(build(lifespan=lifespan), port=port, log_config=None).start()
    assert seen == ["ended"]


async def test_a_lifespan_that_raises_stops_the_start() -> None:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    server = UvicornServer(build(lifespan=lifespan), port=0, log_config=None)
    with pytest.raises(ConfigurationError, match="The application did not start"):
        await server.start()
    assert not listens(server.port)


async def test_a_start_that_is_cancelled_leaves_no_open_port() -> None:
    entered = asyncio.Event()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        entered.set()
        await asyncio.Event().wait()
        yield

    server = UvicornServer(build(lifespan=lifespan), port=0, log_config=None)
    start = asyncio.create_task(server.start())
    await asyncio.wait_for(entered.wait(), BOUND)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()  # the application's own start, which the loop's end would cancel


@pytest.mark.parametrize(("grace", "status"), [(30, 204), (0, 500)])
async def test_a_request_that_runs_ends_within_the_grace_and_is_cut_after_it(grace: float, status: int) -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            entered.set()
            await gate.wait()
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

    async with serving(app) as (server, client):
        request = asyncio.create_task(client.get("/"))
        await asyncio.wait_for(entered.wait(), BOUND)
        stop = asyncio.create_task(server.stop(grace))
        if grace:
            gate.set()
        assert (await asyncio.wait_for(request, BOUND)).status_code == status
        await asyncio.wait_for(stop, BOUND)


async def test_a_server_that_has_served_its_most_requests_ends_the_run() -> None:
    server = UvicornServer(build(), port=0, log_config=None, limit_max_requests=1)
    ready = asyncio.Event()
    task = asyncio.create_task(run(server, checker=HealthChecker(), delay=0, grace=0, on_ready=ready.set))
    await asyncio.wait_for(ready.wait(), BOUND)
    async with httpx.AsyncClient(trust_env=False) as client:
        await client.get(f"http://127.0.0.1:{server.port}/")
    with pytest.raises(RuntimeError, match="A server ended"):
        await asyncio.wait_for(task, BOUND)


async def test_while_the_service_drains_every_reply_asks_for_another_connection_and_is_served() -> None:
    checker = HealthChecker()
    ready, drains = asyncio.Event(), asyncio.Event()
    checker.subscribe(lambda: drains.set() if checker.phase == "draining" else None)
    server = UvicornServer(build(checker), port=0, log_config=None)
    probes = UvicornServer(HealthApp(checker), port=0, log_config=None)
    task = asyncio.create_task(run(server, probes, checker=checker, delay=600, grace=5, on_ready=ready.set))
    await asyncio.wait_for(ready.wait(), BOUND)
    urls = [f"http://127.0.0.1:{server.port}{path}" for path in ("/", "/health", "/health/ready", "/nowhere")]
    probe = f"http://127.0.0.1:{probes.port}/health/ready"
    async with httpx.AsyncClient(trust_env=False) as client:
        kept = [await client.get(url) for url in urls]
        assert (await client.get(probe)).status_code == 200
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(drains.wait(), BOUND)
        parted = [await client.get(url) for url in urls]
        assert (await client.get(probe)).status_code == 503
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(task, BOUND)
    assert [(reply.status_code, reply.headers.get("connection")) for reply in kept] == [
        (200, "keep-alive"),
        (200, None),
        (200, None),
        (404, None),
    ]
    assert [(reply.status_code, reply.headers.get_list("connection")) for reply in parted] == [
        (200, ["close"]),
        (200, ["close"]),
        (503, ["close"]),
        (404, ["close"]),
    ]


@pytest.mark.parametrize(("version", "told"), [("1.0", "close"), ("1.1", "close"), ("2", None), ("3", None)])
async def test_only_http_1_is_asked_for_another_connection(version: str, told: str | None) -> None:
    checker = HealthChecker()
    checker.drain()
    for path in ("/nowhere", "/health/ready"):
        scope = {**http_scope("GET", path), "http_version": version}
        assert (await Wire().run(build(checker), scope)).headers.get("connection") == told


async def test_without_a_checker_connections_are_the_servers_business() -> None:
    assert "connection" not in (await connect(build()).get("/nowhere")).headers


async def test_a_reply_never_waits_for_the_acknowledgement_of_the_last_one() -> None:
    seen: list[int] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await FastAPI()(scope, receive, send)
            return
        transport = receive.__self__.transport  # type: ignore[attr-defined] # uvicorn's own cycle
        connection = transport.get_extra_info("socket")
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await Response("")(scope, receive, send)

    async with serving(look) as (_, client):
        await client.get("/")
    assert seen == [1]


async def test_a_served_request_leaves_nothing_to_the_garbage_collector() -> None:
    gone: list[weakref.ref[Any]] = []

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)
        gone.append(weakref.ref(scope["state"]["witness"]))

    app = FastAPI()

    @app.get("/")
    async def root(request: Request) -> str:
        request.state.witness = Witness()
        return "served"

    install(app, Pipeline([RateLimitPolicy(MemoryStore(), "10/minute")]))
    inner: Any = app
    async with serving(note) as (_, client):
        gc.collect()
        gc.disable()
        try:
            await client.get("/")
        finally:
            gc.enable()
        await client.aclose()
    assert [reference() for reference in gone] == [None]


class Witness:
    """Lives as long as its request."""
