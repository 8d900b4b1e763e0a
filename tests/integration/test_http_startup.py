from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from http_middleware import ResilienceMiddleware, install
from resilience import (
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    RateLimitPolicy,
    Rule,
    Selective,
)
from tests.integration.http_driver import Wire, connect, http_scope

LIFESPAN: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}


def for_operations(*operations: str) -> Policy:
    return RateLimitPolicy(MemoryStore(), Rule("9/minute", operations=operations))


def build(*core: Policy) -> tuple[FastAPI, list[str]]:
    started: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        started.append("application")
        yield

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_api_route("/items/{item}", lambda item: item)
    app.add_api_route("/orders", lambda: "created", methods=["POST"])

    @app.websocket("/rooms/{room}")
    async def room(websocket: WebSocket) -> None:
        await websocket.close()

    install(app, Pipeline(core))
    return app, started


async def start(app: Starlette) -> Wire:
    return await Wire([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]).run(app, dict(LIFESPAN))


WRONG = [
    "GET /items",
    "POST /items/{item}",
    "GET /items/{id}",
    "GET /items/1",
    "get /items/{item}",
    "GET items/{item}",
    "ORDERS",
]


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_rule_for_a_route_that_is_not_there_stops_the_start_and_names_what_is(wrong: str) -> None:
    app, started = build(for_operations(wrong))

    wire = await start(app)

    assert wire.sent == [
        {
            "type": "lifespan.startup.failed",
            "message": f"Policies name operations that are no route: {wrong}. "
            "Routes: GET /items/{item}, POST /orders, WEBSOCKET /rooms/{room}.",
        }
    ]
    assert started == []


async def test_a_rule_for_head_stops_the_start_where_head_counts_as_a_get() -> None:
    async def item(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("item")

    app = Starlette(routes=[Route("/items/{item}", item)])
    install(app, Pipeline([for_operations("HEAD /items/{item}")]))

    wire = await start(app)

    assert wire.sent[0]["type"] == "lifespan.startup.failed"


async def test_a_selective_policy_for_a_route_that_is_not_there_stops_the_start() -> None:
    app, _ = build(Selective(IdempotencyPolicy(MemoryStore()), ["POST /payments"]))

    wire = await start(app)

    assert wire.sent[0]["type"] == "lifespan.startup.failed"
    assert "POST /payments" in wire.sent[0]["message"]


async def test_every_wrong_name_is_told_at_once() -> None:
    app, _ = build(for_operations("GET /wrong", "GET /items/{item}"), for_operations("GET /also-wrong"))

    wire = await start(app)

    assert "no route: GET /also-wrong, GET /wrong. Routes:" in wire.sent[0]["message"]


async def test_names_that_are_routes_let_it_start() -> None:
    app, started = build(for_operations("GET /items/{item}", "POST /orders", "WEBSOCKET /rooms/{room}"))

    wire = await start(app)

    assert [message["type"] for message in wire.sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert started == ["application"]


async def test_the_name_of_a_grpc_method_is_not_for_this_door_to_know() -> None:
    app, _ = build(for_operations("POST /orders", "/shop.v1.Orders/Create"))

    wire = await start(app)

    assert wire.sent[0]["type"] == "lifespan.startup.complete"


async def test_without_a_lifespan_every_request_fails_loudly() -> None:
    app, _ = build(for_operations("GET /nowhere"))

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="GET /nowhere"):
            await Wire().run(app, http_scope("GET", "/items/1"))


async def test_a_server_that_goes_on_after_a_failed_start_serves_nothing() -> None:
    app, _ = build(for_operations("GET /nowhere"))
    await start(app)

    assert (await connect(app).get("/items/1")).status_code == 500


async def test_added_as_middleware_every_request_of_a_wrong_rule_fails_loudly() -> None:
    app = FastAPI()
    app.add_api_route("/items/{item}", lambda item: item)
    app.add_middleware(ResilienceMiddleware, pipeline=Pipeline([for_operations("GET /nowhere")]))

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="GET /nowhere"):
            await Wire().run(app, http_scope("GET", "/items/1"))


async def test_around_an_application_without_routes_every_request_of_a_rule_with_names_fails_loudly() -> None:
    async def hello(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("hello")(scope, receive, send)

    app = ResilienceMiddleware(hello, Pipeline([for_operations("GET /items/{item}")]))

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="Routes: none"):
            await Wire().run(app, http_scope("GET", "/items/1"))


async def test_an_application_that_serves_already_can_not_be_guarded_any_more() -> None:
    app = FastAPI()
    await connect(app).get("/")

    with pytest.raises(ConfigurationError, match="before the application serves"):
        install(app, Pipeline())


async def test_an_application_that_has_started_already_can_not_be_guarded_any_more() -> None:
    app = FastAPI()
    await start(app)

    with pytest.raises(ConfigurationError, match="before the application serves"):
        install(app, Pipeline())


async def test_routes_that_are_declared_after_install_are_known() -> None:
    app, _ = build(for_operations("GET /late"))
    app.add_api_route("/late", lambda: "late")

    wire = await start(app)

    assert wire.sent[0]["type"] == "lifespan.startup.complete"
