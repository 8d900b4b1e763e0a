"""Tiers, costs, rules in shadow and rules at the edge, as a client over HTTP meets them."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_middleware import install
from resilience import (
    Admission,
    Call,
    HealthChecker,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    Rule,
    get_request_context,
    set_context_user,
)
from resilience.policies.rule import address
from resilience.testing import ManualClock
from tests.integration.http_driver import Wire, connect, websocket_scope

PLANS = {"ann": "100/minute", "bob": "2/minute", "root": None}


async def plan(_call: Call, _admission: Admission) -> str | None:
    return PLANS.get(get_request_context().user_id or "", "1/minute")


async def rows(call: Call, _admission: Admission) -> int:
    return len(json.loads(await call.payload(100)))


class Authentication:
    """The application's own: knows whom a token belongs to, and notes what it was asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = dict(scope.get("headers", ())).get(b"authorization")
        scope["app"].state.asked.append(scope["type"])
        if token == b"wrong":
            await JSONResponse({"detail": "Who?"}, 401)(scope, receive, send)
            return
        if token is not None:
            set_context_user(token.decode())
        await self.app(scope, receive, send)


def build(*rules: Rule | str, health: HealthChecker | None = None) -> FastAPI:
    """Return an application that is guarded at both stages."""
    app = FastAPI()

    @app.get("/things")
    async def read() -> str:
        return "things"

    @app.post("/batches")
    async def batch(request: Request) -> Any:
        return await request.json()

    @app.websocket("/room")
    async def room(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    limits = RateLimitPolicy(MemoryStore(clock=ManualClock()), rules)
    app.add_middleware(Authentication)
    app.state.asked = []
    install(app, Pipeline([limits]), health=health)
    return app


def by(user: str) -> dict[str, str]:
    return {"authorization": user}


# --- tiers and costs


async def test_each_user_has_the_limit_of_its_plan_and_is_told_its_own() -> None:
    client = connect(build(Rule(plan)))

    ann, bob, nobody = [await client.get("/things", headers=headers) for headers in (by("ann"), by("bob"), {})]

    assert [each.headers["x-ratelimit-limit"] for each in (ann, bob, nobody)] == ["100", "2", "1"]
    assert ann.headers["ratelimit-policy"] == '"plan";q=100;w=60'
    assert ann.headers["ratelimit"] == '"plan";r=99;t=60'
    assert bob.headers["ratelimit-policy"] == '"plan";q=2;w=60'


async def test_who_is_over_the_limit_of_its_plan_is_told_its_own_while_others_get_in() -> None:
    client = connect(build(Rule(plan)))

    bobs = [await client.get("/things", headers=by("bob")) for _ in range(3)]

    assert [each.status_code for each in bobs] == [200, 200, 429]
    assert bobs[2].headers["x-ratelimit-limit"] == "2"
    assert (await client.get("/things", headers=by("ann"))).status_code == 200


async def test_a_plan_without_a_limit_is_told_none() -> None:
    client = connect(build(Rule(plan)))

    responses = [await client.get("/things", headers=by("root")) for _ in range(3)]

    assert [each.status_code for each in responses] == [200, 200, 200]
    assert not any("ratelimit" in name for each in responses for name in each.headers)


async def test_a_batch_costs_what_it_holds_and_still_reaches_its_endpoint() -> None:
    client = connect(build(Rule("10/minute", cost=rows, operations=["POST /batches"])))

    first = await client.post("/batches", json=[1, 2, 3])
    second = await client.post("/batches", json=list(range(8)))

    assert (first.status_code, first.json(), first.headers["x-ratelimit-remaining"]) == (200, [1, 2, 3], "7")
    assert (second.status_code, second.headers["x-ratelimit-remaining"]) == (429, "7")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_batch_that_is_larger_than_its_cost_function_reads_is_too_large(streamed: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 50

    content = chunks() if streamed else b" " * 150
    client = connect(build(Rule("10/minute", cost=rows, operations=["POST /batches"])))

    response = await client.post("/batches", content=content)

    assert response.status_code == 413


async def test_a_function_that_answers_nonsense_is_an_unhandled_error_that_shows_nothing() -> None:
    def nonsense(_call: Call, _admission: Admission) -> str:
        return "hunter2"

    response = await connect(build(Rule(nonsense))).get("/things")

    assert response.status_code == 500
    assert response.headers["x-request-id"].startswith("req_")
    assert "hunter2" not in response.text


# --- rules in shadow


async def test_a_rule_in_shadow_is_in_no_header_and_denies_no_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "resilience")
    client = connect(build("5/minute", Rule("1/minute", shadow=True)))

    responses = [await client.get("/things") for _ in range(3)]

    assert [each.status_code for each in responses] == [200, 200, 200]
    assert [each.headers["ratelimit"] for each in responses] == [f'"5/minute";r={left};t=60' for left in (4, 3, 2)]
    assert "Shadow rule 1/minute would have denied 1 calls" in caplog.text


# --- rules at the edge


async def test_a_flood_is_refused_before_authentication_like_any_other_refusal() -> None:
    app = build(Rule("2/minute", key=address, stage="edge"), "9/minute")
    client = connect(app)

    responses = [await client.get("/things", headers=by("wrong")) for _ in range(4)]

    assert [each.status_code for each in responses] == [401, 401, 429, 429]
    assert app.state.asked == ["http", "http"]
    assert responses[3].json() == {"detail": "Too many requests", "retry_after": 60}
    assert responses[3].headers["retry-after"] == "60"
    assert responses[3].headers["x-request-id"].startswith("req_")
    assert responses[3].headers["ratelimit"] == '"2/minute";r=0;t=60'


async def test_a_reply_tells_the_rules_of_both_stages_together() -> None:
    response = await connect(build("9/minute", Rule("2/minute", key=address, stage="edge"))).get("/things")

    assert response.headers.get_list("ratelimit-policy") == ['"2/minute";q=2;w=60, "9/minute";q=9;w=60']
    assert response.headers.get_list("x-ratelimit-limit") == ["2"]


async def test_at_the_edge_a_caller_is_its_key_or_its_address_whoever_is_logged_in() -> None:
    client = connect(build(Rule("1/minute", stage="edge")))
    sent = [by("ann"), by("bob"), {**by("ann"), "x-api-key": "a"}, {**by("bob"), "x-api-key": "a"}]

    assert [(await client.get("/things", headers=each)).status_code for each in sent] == [200, 429, 200, 429]


async def test_a_rule_at_the_edge_may_name_its_routes() -> None:
    client = connect(build(Rule("1/minute", stage="edge", operations=["POST /batches"])))

    assert [(await client.post("/batches", json=[])).status_code for _ in range(2)] == [200, 429]
    assert (await client.get("/things")).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health/startup"])
async def test_a_probe_is_not_limited_at_the_edge_either(path: str) -> None:
    client = connect(build(Rule("1/minute", key=address, stage="edge"), health=HealthChecker()))
    await client.get("/things")

    responses = [await client.get(path) for _ in range(3)]

    assert [each.status_code for each in responses] == [200, 200, 200]
    assert (await client.get("/things")).status_code == 429


async def test_a_handshake_is_refused_at_the_edge_as_it_is_at_the_core() -> None:
    app = build(Rule("1/minute", key=address, stage="edge"))
    handshake: list[Message] = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}]
    await Wire(handshake).run(app, websocket_scope("/room"))

    wire = await Wire(handshake).run(app, websocket_scope("/room"))

    assert wire.sent == [{"type": "websocket.close", "code": 1013}]
