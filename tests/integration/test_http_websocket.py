import json
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, WebSocket
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_middleware import ResilienceMiddleware, install
from resilience import (
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    RateLimitPolicy,
    RequestContextPolicy,
    Rule,
    get_correlation_id,
    get_request_id,
)
from resilience.testing import ManualClock
from tests.integration.http_driver import Wire, connect, websocket_scope

DENIAL = "websocket.http.response"


def greeting() -> list[Message]:
    return [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}]


def limit(quota: str = "1/minute", **options: Any) -> RateLimitPolicy:
    return RateLimitPolicy(MemoryStore(clock=ManualClock()), Rule(quota, **options))


async def accepts(_scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept", "headers": [(b"X-Request-ID", b"own"), (b"x-app", b"kept")]})


def build(*core: Policy) -> FastAPI:
    app = FastAPI()

    @app.websocket("/rooms/{room}")
    async def room(websocket: WebSocket, room: str) -> None:
        await websocket.accept()
        await websocket.send_json([room, get_request_id(), get_correlation_id()])
        await websocket.close()

    @app.websocket("/closed")
    async def closed(_websocket: WebSocket) -> None:
        raise HTTPException(403)

    install(app, Pipeline(core))
    return app


async def knock(app: ASGIApp, path: str = "/rooms/1", *headers: tuple[bytes, bytes], denial: bool = False) -> Wire:
    scope = websocket_scope(path, *headers, extensions=[DENIAL] if denial else [])
    return await Wire(greeting()).run(app, scope)


def only_header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes:
    (value,) = [value for key, value in headers if key.lower() == name]
    return value


async def test_an_accepted_handshake_carries_each_id_once_and_keeps_the_applications_headers() -> None:
    wire = await knock(ResilienceMiddleware(accepts, Pipeline()))

    accept = wire.sent[0]
    assert accept["type"] == "websocket.accept"
    assert only_header(accept["headers"], b"x-request-id").startswith(b"req_")
    assert only_header(accept["headers"], b"x-correlation-id")
    assert only_header(accept["headers"], b"x-app") == b"kept"


async def test_a_websocket_endpoint_sees_the_ids_of_its_handshake() -> None:
    wire = await knock(build(), "/rooms/7", (b"x-correlation-id", b"mine"))

    accept, text = wire.sent[0], wire.sent[1]
    request_id = only_header(accept["headers"], b"x-request-id").decode()
    assert json.loads(text["text"]) == ["7", request_id, "mine"]


async def test_an_accepted_handshake_tells_its_limits() -> None:
    wire = await knock(build(limit("5/minute")))

    assert only_header(wire.sent[0]["headers"], b"x-ratelimit-remaining") == b"4"


async def test_a_handshake_over_the_limit_is_closed_as_try_again_later_before_it_reaches_the_endpoint() -> None:
    app = build(limit())
    await knock(app)

    wire = await knock(app)

    assert wire.sent == [{"type": "websocket.close", "code": 1013}]


async def test_a_handshake_over_the_limit_gets_the_http_refusal_where_the_server_can_send_one() -> None:
    app = build(limit())
    await knock(app)

    wire = await knock(app, denial=True)

    assert [message["type"] for message in wire.sent] == [f"{DENIAL}.start", f"{DENIAL}.body"]
    assert wire.status == 429
    assert json.loads(wire.body) == {
        "detail": "Too many requests",
        "retry_after": int(wire.headers["retry-after"]),
    }
    assert wire.headers["x-request-id"].startswith("req_")
    assert wire.headers["x-ratelimit-remaining"] == "0"


async def test_a_handshake_that_no_wait_can_help_is_closed_as_a_policy_violation() -> None:
    wire = await knock(build(limit("1/minute", cost=2)))

    assert wire.sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_handshake_is_refused_at_the_edge_as_well() -> None:
    app = ResilienceMiddleware(accepts, Pipeline(edge=[RequestContextPolicy(), limit()]))
    await knock(app)

    wire = await knock(app)

    assert wire.sent == [{"type": "websocket.close", "code": 1013}]


async def test_a_rule_may_name_a_websocket_route() -> None:
    app = build(limit(operations=["WEBSOCKET /rooms/{room}"]))
    await knock(app, "/rooms/1")

    wire = await knock(app, "/rooms/2")

    assert wire.sent == [{"type": "websocket.close", "code": 1013}]


async def test_a_websocket_and_a_get_of_one_path_are_two_operations() -> None:
    app = build(limit(operations=["WEBSOCKET /rooms/{room}"]))
    app.add_api_route("/rooms/{room}", lambda room: room)
    await knock(app)

    response = await connect(app).get("/rooms/1")

    assert response.status_code == 200
    assert "x-ratelimit-limit" not in response.headers


async def test_a_denial_of_the_applications_own_carries_ids() -> None:
    wire = await knock(build(), "/closed", denial=True)

    assert wire.status == 403
    assert wire.headers["x-request-id"].startswith("req_")


async def test_a_handshake_with_an_idempotency_key_is_refused_and_not_silently_unprotected() -> None:
    app = build(IdempotencyPolicy(MemoryStore()))

    wire = await knock(app, "/rooms/1", (b"idempotency-key", b"k"), denial=True)

    assert wire.status == 400


async def test_an_error_in_a_websocket_is_raised_on_without_an_http_answer() -> None:
    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("broken")

    wire = Wire(greeting())

    with pytest.raises(RuntimeError, match="broken"):
        await wire.run(ResilienceMiddleware(broken, Pipeline()), websocket_scope("/"))

    assert wire.sent == []
