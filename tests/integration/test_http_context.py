import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware import ResilienceMiddleware, install
from resilience import (
    Pipeline,
    add_request_context,
    copy_context,
    get_correlation_id,
    get_request_context,
    get_request_id,
    get_tracing_headers,
    restore_context,
    set_context_user,
)
from tests.integration.http_driver import Wire, connect, http_scope, within


class DomainError(Exception):
    pass


class Recorded:
    """An application that notes which request id each of its parts sees."""

    def __init__(self) -> None:
        self.ids: dict[str, str | None] = {}
        self.app = FastAPI()
        self.app.add_api_route("/async", self.async_endpoint)
        self.app.add_api_route("/sync", self.sync_endpoint)
        for name, dependency in (
            ("async", self.async_dependency),
            ("sync", self.sync_dependency),
            ("async-yield", self.async_yield_dependency),
            ("sync-yield", self.sync_yield_dependency),
        ):
            self.app.add_api_route(f"/{name}-dependency", lambda: None, dependencies=[Depends(dependency)])
        self.app.add_api_route("/background", self.background)
        self.app.add_api_route("/async-stream", self.async_stream)
        self.app.add_api_route("/sync-stream", self.sync_stream)
        self.app.add_api_route("/thread", self.thread)
        self.app.add_api_route("/task", self.task)
        self.app.add_api_route("/domain-error", self.domain_error)
        self.app.add_exception_handler(DomainError, self.on_domain_error)
        self.app.middleware("http")(self.outermost)
        install(self.app, Pipeline())

    def note(self, where: str) -> None:
        self.ids[where] = get_request_id()

    async def note_later(self, where: str) -> None:
        self.note(where)

    async def async_endpoint(self) -> None:
        self.note("endpoint")

    def sync_endpoint(self) -> None:
        self.note("endpoint")

    async def async_dependency(self) -> None:
        self.note("dependency")

    def sync_dependency(self) -> None:
        self.note("dependency")

    async def async_yield_dependency(self) -> AsyncIterator[None]:
        self.note("before")
        yield
        self.note("after")

    def sync_yield_dependency(self) -> Iterator[None]:
        self.note("before")
        yield
        self.note("after")

    async def background(self, tasks: BackgroundTasks) -> None:
        tasks.add_task(self.note_later, "async task")
        tasks.add_task(self.note, "sync task")

    async def async_stream(self) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            self.note("first chunk")
            yield b"a"
            self.note("last chunk")
            yield b"b"

        return StreamingResponse(chunks())

    async def sync_stream(self) -> Response:
        def chunks() -> Iterator[bytes]:
            self.note("first chunk")
            yield b"a"
            self.note("last chunk")
            yield b"b"

        return StreamingResponse(chunks())

    async def thread(self) -> None:
        await asyncio.to_thread(self.note, "to_thread")
        await run_in_threadpool(self.note, "run_in_threadpool")

    async def task(self) -> None:
        await within(asyncio.create_task(self.note_later("task")))

    async def domain_error(self) -> None:
        raise DomainError

    async def on_domain_error(self, _request: Request, _error: Exception) -> Response:
        self.note("handler")
        return JSONResponse({}, 400)

    async def outermost(self, request: Request, call_next: Any) -> Any:
        if request.url.path == "/middleware":
            self.note("middleware")
        return await call_next(request)


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("/async", {"endpoint"}),
        ("/sync", {"endpoint"}),
        ("/async-dependency", {"dependency"}),
        ("/sync-dependency", {"dependency"}),
        ("/async-yield-dependency", {"before", "after"}),
        ("/sync-yield-dependency", {"before", "after"}),
        ("/background", {"async task", "sync task"}),
        ("/async-stream", {"first chunk", "last chunk"}),
        ("/sync-stream", {"first chunk", "last chunk"}),
        ("/thread", {"to_thread", "run_in_threadpool"}),
        ("/task", {"task"}),
        ("/domain-error", {"handler"}),
        ("/middleware", {"middleware"}),
    ],
)
async def test_the_requests_own_context_is_visible_there(path: str, places: set[str]) -> None:
    recorded = Recorded()

    response = await connect(recorded.app).get(path)

    assert recorded.ids == dict.fromkeys(places, response.headers["x-request-id"])


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_user_that_a_dependency_names_is_seen_by_the_endpoint_and_its_logs(kind: str) -> None:
    app = FastAPI()

    async def authenticate() -> None:
        set_context_user("alice", "acme")

    def authenticate_in_a_thread() -> None:
        set_context_user("alice", "acme")

    chosen = authenticate if kind == "async" else authenticate_in_a_thread

    @app.get("/")
    async def endpoint(_: Annotated[None, Depends(chosen)]) -> dict[str, Any]:
        return dict(add_request_context(None, "info", {"event": "hello"}))

    install(app, Pipeline())

    logged = (await connect(app).get("/")).json()

    assert (logged["user_id"], logged["tenant_id"], logged["event"]) == ("alice", "acme", "hello")


async def test_a_user_that_a_middleware_outside_of_the_door_names_is_adopted() -> None:
    async def endpoint(_scope: Scope, _receive: Receive, send: Send) -> None:
        context = get_request_context()
        await JSONResponse([context.user_id, context.tenant_id])(_scope, _receive, send)

    guarded = ResilienceMiddleware(endpoint, Pipeline())

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        set_context_user("alice", "acme")
        await guarded(scope, receive, send)

    response = await within(asyncio.create_task(connect(outside).get("/")))

    assert response.json() == ["alice", "acme"]


async def test_nothing_is_left_of_a_request_once_it_has_ended() -> None:
    recorded = Recorded()

    await connect(recorded.app).get("/async")

    assert not get_request_context()
    assert get_request_id() is None
    assert get_correlation_id() is None
    assert get_tracing_headers() == {}


async def test_nothing_is_left_of_a_request_that_failed() -> None:
    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("broken")

    await connect(ResilienceMiddleware(broken, Pipeline())).get("/")

    assert not get_request_context()


async def test_a_user_never_leaks_into_the_next_request() -> None:
    app = FastAPI()

    @app.get("/first")
    async def first() -> None:
        set_context_user("alice", "acme")

    @app.get("/second")
    async def second() -> list[str | None]:
        context = get_request_context()
        return [context.user_id, context.tenant_id]

    install(app, Pipeline())
    client = connect(app)

    await client.get("/first")

    assert (await client.get("/second")).json() == [None, None]


async def test_a_hundred_requests_at_once_each_see_their_own_context() -> None:
    app = FastAPI()
    together = asyncio.Barrier(100)

    @app.get("/{name}")
    async def endpoint(name: str) -> list[str | None]:
        set_context_user(name)
        await within(together.wait())
        return [get_request_id(), get_correlation_id(), get_request_context().user_id]

    install(app, Pipeline())
    client = connect(app)

    names = [f"caller-{number}" for number in range(100)]
    responses = await asyncio.gather(*(client.get(f"/{name}", headers={"X-Correlation-ID": name}) for name in names))

    expected = [[response.headers["x-request-id"], name, name] for name, response in zip(names, responses, strict=True)]
    assert [response.json() for response in responses] == expected


async def test_a_request_inside_of_a_request_has_a_context_of_its_own_and_restores_the_outer_one() -> None:
    inner = FastAPI()

    @inner.get("/inner")
    async def inner_endpoint() -> dict[str, str | None]:
        set_context_user("inner user")
        context = get_request_context()
        return {
            "request_id": context.request_id,
            "correlation_id": context.correlation_id,
            "parent_request_id": context.parent_request_id,
        }

    install(inner, Pipeline())
    outer = FastAPI()

    @outer.get("/outer")
    async def outer_endpoint() -> dict[str, Any]:
        set_context_user("outer user")
        response = await connect(inner).get("/inner", headers=get_tracing_headers())
        context = get_request_context()
        return {"after": [context.request_id, context.correlation_id, context.user_id], "inner": response.json()}

    install(outer, Pipeline())

    response = await connect(outer).get("/outer", headers={"X-Correlation-ID": "chain"})

    outer_id = response.headers["x-request-id"]
    found = response.json()
    assert found["after"] == [outer_id, "chain", "outer user"]
    assert found["inner"]["parent_request_id"] == outer_id
    assert found["inner"]["correlation_id"] == "chain"
    assert found["inner"]["request_id"] != outer_id


async def test_a_snapshot_carries_the_ids_into_work_that_outlives_the_request_and_nothing_flows_back() -> None:
    app = FastAPI()
    jobs: list[asyncio.Task[list[str | None]]] = []
    answered = asyncio.Event()

    async def job(snapshot: Any) -> list[str | None]:
        await within(answered.wait())
        restore_context(snapshot)
        set_context_user("the job's own")
        return [get_request_id(), get_correlation_id()]

    @app.get("/")
    async def endpoint() -> None:
        jobs.append(asyncio.create_task(job(copy_context())))

    install(app, Pipeline())

    response = await connect(app).get("/")
    answered.set()

    assert await within(jobs[0]) == [response.headers["x-request-id"], response.headers["x-correlation-id"]]
    assert not get_request_context()


async def test_a_request_that_is_cut_off_leaves_no_context_behind() -> None:
    started = asyncio.Event()
    left: list[bool] = []

    async def hangs(_scope: Scope, _receive: Receive, _send: Send) -> None:
        started.set()
        await asyncio.Event().wait()

    guarded: ASGIApp = ResilienceMiddleware(hangs, Pipeline())

    async def serve() -> None:
        try:
            await Wire().run(guarded, http_scope())
        finally:
            left.append(bool(get_request_context()))

    task = asyncio.create_task(serve())
    await within(started.wait())
    task.cancel()
    await asyncio.wait([task])

    assert left == [False]
