from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware import install
from resilience import (
    Admission,
    Call,
    HealthChecker,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    RequestContextPolicy,
    Rule,
    set_context_user,
)
from resilience.testing import FaultyStore, ManualClock
from tests.integration.http_driver import Wire, connect, http_scope

PROBLEM = "application/problem+json"
HEADERS = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "ratelimit", "ratelimit-policy")


class Clocked:
    """A pipeline with one rate limit, and the clock it goes by."""

    def __init__(self, *rules: Rule | str, **options: Any) -> None:
        self.clock = ManualClock()
        self.store = FaultyStore(MemoryStore(clock=self.clock))
        self.pipeline = Pipeline([RateLimitPolicy(self.store, rules, **options)])


def build(*rules: Rule | str, health: HealthChecker | None = None) -> FastAPI:
    return build_on(Clocked(*rules), health=health)


def build_on(clocked: Clocked, health: HealthChecker | None = None) -> FastAPI:
    app = FastAPI()
    ran: list[str] = []
    app.state.ran = ran

    @app.get("/items/{item}")
    async def read_item(item: int) -> int:
        ran.append(f"GET {item}")
        return item

    @app.post("/items/{item}")
    async def change_item(item: int) -> int:
        ran.append(f"POST {item}")
        return item

    @app.get("/forbidden")
    async def forbidden() -> None:
        raise HTTPException(403)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"a"
            yield b"b"

        return StreamingResponse(chunks())

    install(app, clocked.pipeline, health=health)
    return app


async def statuses(client: httpx.AsyncClient, *requests: str) -> list[int]:
    pairs = [request.split(" ", 1) for request in requests]
    return [(await client.request(method, path)).status_code for method, path in pairs]


async def test_a_refusal_has_exactly_the_plain_body_and_a_retry_after() -> None:
    clocked = Clocked("1/minute")
    client = connect(build_on(clocked))
    await client.get("/items/1")
    clocked.clock.advance(14.5)

    response = await client.get("/items/1")

    assert response.status_code == 429
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"detail": "Too many requests", "retry_after": 46}
    assert response.headers["retry-after"] == "46"


async def test_a_refusal_tells_its_limits_and_carries_ids() -> None:
    client = connect(build("1/minute"))
    await client.get("/items/1")

    response = await client.get("/items/1")

    assert {name: response.headers[name] for name in HEADERS} == {
        "x-ratelimit-limit": "1",
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": "60",
        "ratelimit": '"1/minute";r=0;t=60',
        "ratelimit-policy": '"1/minute";q=1;w=60',
    }
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["x-correlation-id"]


async def test_a_refused_request_never_reaches_its_endpoint() -> None:
    app = build("1/minute")

    await statuses(connect(app), "GET /items/1", "GET /items/2")

    assert app.state.ran == ["GET 1"]


async def test_who_waits_as_long_as_retry_after_says_gets_in() -> None:
    clocked = Clocked("2/minute")
    client = connect(build_on(clocked))
    await statuses(client, "GET /items/1", "GET /items/1")
    clocked.clock.advance(0.25)
    refused = await client.get("/items/1")

    clocked.clock.advance(int(refused.headers["retry-after"]))

    assert (await client.get("/items/1")).status_code == 200


async def test_who_waits_a_second_less_does_not_get_in() -> None:
    clocked = Clocked("2/minute")
    client = connect(build_on(clocked))
    await statuses(client, "GET /items/1", "GET /items/1")
    clocked.clock.advance(0.25)
    refused = await client.get("/items/1")

    clocked.clock.advance(int(refused.headers["retry-after"]) - 1)

    assert (await client.get("/items/1")).status_code == 429


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/items/1", 200),
        ("GET", "/nowhere", 404),
        ("DELETE", "/items/1", 405),
        ("GET", "/items/many", 422),
        ("GET", "/forbidden", 403),
        ("GET", "/broken", 500),
        ("GET", "/stream", 200),
    ],
)
async def test_every_response_tells_its_limits_once(method: str, path: str, status: int) -> None:
    response = await connect(build("5/minute")).request(method, path)

    assert response.status_code == status
    assert [response.headers.get_list(name) for name in HEADERS] == [
        ["5"],
        ["4"],
        ["60"],
        ['"5/minute";r=4;t=60'],
        ['"5/minute";q=5;w=60'],
    ]


async def test_limits_that_the_application_tells_itself_give_way_to_ours() -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: PlainTextResponse("", headers={"X-RateLimit-Limit": "999", "RateLimit": "own"}))
    install(app, Clocked("5/minute").pipeline)

    response = await connect(app).get("/")

    assert response.headers.get_list("x-ratelimit-limit") == ["5"]
    assert response.headers.get_list("ratelimit") == ['"5/minute";r=4;t=60']


async def test_of_several_rules_the_classic_headers_speak_of_the_one_nearest_to_its_end() -> None:
    response = await connect(build("100/hour", "2/minute")).get("/items/1")

    assert response.headers["x-ratelimit-limit"] == "2"
    assert response.headers["ratelimit"] == '"100/hour";r=99;t=3600, "2/minute";r=1;t=60'


@pytest.mark.parametrize("stage", ["core", "edge"])
async def test_two_policies_tell_the_classic_headers_once_and_both_their_rules(stage: str) -> None:
    store = MemoryStore(clock=ManualClock())
    daily, burst = RateLimitPolicy(store, "100/day"), RateLimitPolicy(store, "5/minute")
    pipeline = Pipeline([daily, burst]) if stage == "core" else Pipeline([burst], edge=[RequestContextPolicy(), daily])
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    install(app, pipeline)

    headers = (await connect(app).get("/")).headers

    assert [headers.get_list(name) for name in HEADERS[:3]] == [["5"], ["4"], ["60"]]
    assert headers.get("ratelimit") == '"100/day";r=99;t=86400, "5/minute";r=4;t=60'
    assert headers.get("ratelimit-policy") == '"100/day";q=100;w=86400, "5/minute";q=5;w=60'


@pytest.mark.parametrize("accept", [PROBLEM, f"text/html, {PROBLEM};q=0.9, */*;q=0.1"])
async def test_a_refusal_is_problem_details_for_who_accepts_them(accept: str) -> None:
    clocked = Clocked("1/minute")
    client = connect(build_on(clocked), headers={"Accept": accept})
    await client.get("/items/1")
    clocked.clock.advance(14.5)

    response = await client.get("/items/1")

    assert response.status_code == 429
    assert response.headers["content-type"] == PROBLEM
    assert response.json() == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Too many requests",
        "status": 429,
        "code": "rate_limited",
        "request_id": response.headers["x-request-id"],
        "retry_after": 46,
    }


async def test_a_request_that_costs_more_than_the_limit_is_told_no_time_to_come_back() -> None:
    response = await connect(build(Rule("1/minute", cost=2))).get("/items/1")

    assert response.status_code == 429
    assert response.json() == {"detail": "Too many requests"}
    assert "retry-after" not in response.headers


async def test_a_rule_counts_all_concrete_urls_of_its_route_as_one() -> None:
    client = connect(build(Rule("2/minute", operations=["GET /items/{item}"])))

    assert await statuses(client, "GET /items/1", "GET /items/2?page=1", "GET /items/3") == [200, 200, 429]


async def test_a_rule_leaves_other_methods_and_routes_alone() -> None:
    client = connect(build(Rule("1/minute", operations=["GET /items/{item}"])))
    await client.get("/items/1")

    for method, path, status in (("POST", "/items/1", 200), ("GET", "/stream", 200), ("GET", "/nowhere", 404)):
        response = await client.request(method, path)
        assert response.status_code == status
        assert "x-ratelimit-limit" not in response.headers


async def test_the_operations_of_one_rule_share_its_count() -> None:
    client = connect(build(Rule("2/minute", operations=["GET /items/{item}", "POST /items/{item}"])))

    assert await statuses(client, "GET /items/1", "POST /items/1", "GET /items/1") == [200, 200, 429]


@pytest.mark.parametrize(("limited", "free"), [("/v1", "/v2"), ("/v2", "/v1")])
async def test_a_router_that_is_included_under_two_prefixes_is_limited_where_the_rule_says(
    limited: str, free: str
) -> None:
    router = APIRouter()
    router.add_api_route("/items/{item}", lambda item: item)
    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2")
    install(app, Clocked(Rule("1/minute", operations=[f"GET {limited}/items/{{item}}"])).pipeline)
    client = connect(app)

    assert await statuses(client, *[f"GET {limited}/items/{item}" for item in range(2)]) == [200, 429]
    assert await statuses(client, *[f"GET {free}/items/{item}" for item in range(2)]) == [200, 200]


async def test_a_router_in_a_router_is_limited_under_its_whole_prefix() -> None:
    leaf = APIRouter(prefix="/items")
    leaf.add_api_route("/{item}", lambda item: item)
    branch = APIRouter(prefix="/{tenant}")
    branch.include_router(leaf)
    app = FastAPI()
    app.include_router(branch, prefix="/api")
    install(app, Clocked(Rule("1/minute", operations=["GET /api/{tenant}/items/{item}"])).pipeline)

    assert await statuses(connect(app), "GET /api/a/items/1", "GET /api/b/items/2") == [200, 429]


async def test_a_limit_for_everything_covers_included_routers_and_mounted_applications() -> None:
    router = APIRouter()
    router.add_api_route("/items/{item}", lambda item: item)
    inner = FastAPI()
    inner.add_api_route("/users/{user}", lambda user: user)
    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.mount("/admin", inner)
    install(app, Clocked("1/minute").pipeline)

    assert await statuses(connect(app), "GET /v1/items/1", "GET /admin/users/1") == [200, 429]


async def test_a_rule_may_name_a_route_of_a_mounted_application() -> None:
    inner = FastAPI()
    inner.add_api_route("/users/{user}", lambda user: user)
    app = FastAPI()
    app.mount("/admin", inner)
    install(app, Clocked(Rule("1/minute", operations=["GET /admin/users/{user}"])).pipeline)

    assert await statuses(connect(app), "GET /admin/users/1", "GET /admin/users/2") == [200, 429]


async def test_a_rule_may_name_a_route_of_a_mount_with_a_parameter() -> None:
    async def user(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("")

    app = Starlette(routes=[Mount("/{tenant}", routes=[Route("/users/{user}", user)])])
    install(app, Clocked(Rule("1/minute", operations=["GET /{tenant}/users/{user}"])).pipeline)

    assert await statuses(connect(app), "GET /a/users/1", "GET /b/users/2") == [200, 429]


async def test_a_rule_may_name_the_route_of_an_endpoint_class() -> None:
    class Item(HTTPEndpoint):
        async def get(self, _request: Request) -> PlainTextResponse:
            return PlainTextResponse("")

    app = Starlette(routes=[Route("/items/{item}", Item)])
    install(app, Clocked(Rule("1/minute", operations=["GET /items/{item}"])).pipeline)

    assert await statuses(connect(app), "GET /items/1", "GET /items/2") == [200, 429]


async def test_head_counts_as_the_get_that_answers_it() -> None:
    async def item(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("item")

    app = Starlette(routes=[Route("/items/{item}", item)])
    install(app, Clocked(Rule("2/minute", operations=["GET /items/{item}"])).pipeline)

    assert await statuses(connect(app), "HEAD /items/1", "GET /items/2", "HEAD /items/3") == [200, 200, 429]


async def test_head_counts_as_the_get_of_an_endpoint_class_that_answers_it() -> None:
    class Item(HTTPEndpoint):
        async def get(self, _request: Request) -> PlainTextResponse:
            return PlainTextResponse("")

    app = Starlette(routes=[Route("/items/{item}", Item)])
    install(app, Clocked(Rule("1/minute", operations=["GET /items/{item}"])).pipeline)

    assert await statuses(connect(app), "HEAD /items/1", "HEAD /items/2") == [200, 429]


async def test_a_route_that_answers_nothing_but_head_can_be_limited_by_its_name() -> None:
    app = FastAPI()
    app.add_api_route("/items/{item}", lambda: None, methods=["HEAD"])
    install(app, Clocked(Rule("1/minute", operations=["HEAD /items/{item}"])).pipeline)

    assert await statuses(connect(app), "HEAD /items/1", "HEAD /items/2") == [200, 429]


async def test_a_refused_head_has_the_headers_of_a_refusal() -> None:
    client = connect(build("1/minute"))
    await client.get("/items/1")

    head, get = await client.head("/items/1"), await client.get("/items/1")

    told = ("retry-after", "content-length", "content-type", *HEADERS)
    assert head.status_code == 429
    assert [head.headers[name] for name in told] == [get.headers[name] for name in told]


async def test_the_servers_root_path_does_not_hide_a_route() -> None:
    app = build(Rule("1/minute", operations=["GET /items/{item}"]))
    client = connect(app, root_path="/api")

    assert await statuses(client, "GET /api/items/1", "GET /api/items/2") == [200, 429]


class _WithoutVersion:
    """Rewrites ``/v9/items/1`` to ``/items/1`` for the application inside, on a scope of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix("/v9")
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self.app(scope, receive, send)


async def test_a_path_that_a_middleware_rewrites_is_counted_as_the_route_that_it_reaches() -> None:
    app = build(Rule("1/minute", operations=["GET /items/{item}"]))
    app.add_middleware(_WithoutVersion)

    assert await statuses(connect(app), "GET /v9/items/1", "GET /v9/items/2") == [200, 429]


async def test_unknown_routes_are_never_counted_under_names_of_their_own() -> None:
    names: list[str] = []

    def note(call: Call, _admission: Admission) -> str:
        names.append(call.operation)
        return "all"

    client = connect(build(Rule("100/minute", key=note)))

    await statuses(client, "GET /nowhere", "GET /items/1/2/3", "POST /nowhere", "DELETE /items/1", "PURGE /items/1")

    assert names == ["unmatched"] * 5


async def test_a_known_route_is_counted_under_its_template() -> None:
    names: list[str] = []

    def note(call: Call, _admission: Admission) -> str:
        names.append(call.operation)
        return "all"

    await statuses(connect(build(Rule("100/minute", key=note))), "GET /items/1", "GET /items/many", "POST /items/1")

    assert names == ["GET /items/{item}", "GET /items/{item}", "POST /items/{item}"]


def build_authenticated(clocked: Clocked, *, auth: str) -> FastAPI:
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")

    async def authenticate(request: Request, call_next: Any) -> Any:
        if user := request.headers.get("authorization"):
            set_context_user(user, request.headers.get("x-tenant"))
        return await call_next(request)

    if auth == "before":
        app.middleware("http")(authenticate)
    install(app, clocked.pipeline)
    if auth == "after":
        app.middleware("http")(authenticate)
    return app


@pytest.mark.parametrize("auth", ["before", "after"])
async def test_each_user_that_a_middleware_authenticates_has_a_quota_of_its_own(auth: str) -> None:
    app = build_authenticated(Clocked("1/minute"), auth=auth)
    alice, bob = (connect(app, headers={"Authorization": user}) for user in ("alice", "bob"))

    assert await statuses(alice, "GET /", "GET /") == [200, 429]
    assert await statuses(bob, "GET /", "GET /") == [200, 429]


@pytest.mark.parametrize("auth", ["before", "after"])
async def test_one_user_at_two_addresses_with_two_api_keys_has_one_quota(auth: str) -> None:
    app = build_authenticated(Clocked("1/minute"), auth=auth)
    home = connect(app, address="192.0.2.1", headers={"Authorization": "alice", "X-API-Key": "a"})
    office = connect(app, address="192.0.2.2", headers={"Authorization": "alice", "X-API-Key": "b"})

    assert await statuses(home, "GET /") + await statuses(office, "GET /") == [200, 429]


async def test_users_of_one_name_in_two_tenants_are_two_callers() -> None:
    app = build_authenticated(Clocked("1/minute"), auth="after")
    here, there = (connect(app, headers={"Authorization": "alice", "X-Tenant": name}) for name in ("here", "there"))

    assert await statuses(here, "GET /") + await statuses(there, "GET /") == [200, 200]


async def test_api_keys_distinguish_callers_at_one_address() -> None:
    app = build("1/minute")
    first, second = (connect(app, headers={"X-API-Key": key}) for key in ("first", "second"))

    assert await statuses(first, "GET /items/1", "GET /items/1") == [200, 429]
    assert await statuses(second, "GET /items/1") == [200]


async def test_addresses_distinguish_callers_without_a_key() -> None:
    app = build("1/minute")

    answers = [await statuses(connect(app, address=address), "GET /items/1") for address in ("192.0.2.1", "192.0.2.2")]

    assert answers == [[200], [200]]


async def test_one_ipv6_network_is_one_caller() -> None:
    app = build("1/minute")
    here, neighbour, elsewhere = ("2001:db8:1:1::1", "2001:db8:1:1:ffff::2", "2001:db8:1:2::1")

    answers = [
        await statuses(connect(app, address=address), "GET /items/1") for address in (here, neighbour, elsewhere)
    ]

    assert answers == [[200], [429], [200]]


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
async def test_an_address_that_the_caller_claims_is_ignored(name: str) -> None:
    client = connect(build("1/minute"))

    answers = [await client.get("/items/1", headers={name: f"198.51.100.{number}"}) for number in range(3)]

    assert [answer.status_code for answer in answers] == [200, 429, 429]


async def test_denied_requests_do_not_put_off_the_next_admission() -> None:
    clocked = Clocked("1/minute")
    client = connect(build_on(clocked))
    await client.get("/items/1")
    for _ in range(50):
        clocked.clock.advance(1)
        assert (await client.get("/items/1")).status_code == 429

    clocked.clock.advance(10)

    assert (await client.get("/items/1")).status_code == 200


async def test_what_one_rule_denies_takes_nothing_from_another() -> None:
    clocked = Clocked("10/hour", "1/second")
    client = connect(build_on(clocked))
    assert await statuses(client, *["GET /items/1"] * 10) == [200] + [429] * 9

    clocked.clock.advance(1)

    assert '"10/hour";r=8;' in (await client.get("/items/1")).headers["ratelimit"]


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health/startup"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_probe_is_never_limited_and_carries_neither_ids_nor_limits(method: str, path: str) -> None:
    client = connect(build("1/minute", health=HealthChecker()))
    await client.get("/items/1")

    responses = [await client.request(method, path) for _ in range(3)]

    assert [response.status_code for response in responses] == [200, 200, 200]
    assert not {"x-request-id", "x-correlation-id", *HEADERS} & {name for each in responses for name in each.headers}


async def test_probes_use_up_nothing() -> None:
    client = connect(build("1/minute", health=HealthChecker()))
    await statuses(client, *["GET /health"] * 5)

    assert await statuses(client, "GET /items/1") == [200]


async def test_what_only_looks_like_a_probe_is_limited() -> None:
    client = connect(build("1/minute", health=HealthChecker()))
    await client.get("/items/1")

    paths = ("POST /health", "GET /health/", "GET /healthy", "GET /v1/health", "GET /HEALTH")
    assert await statuses(client, *paths) == [429] * 5


async def test_without_a_store_an_open_limit_lets_callers_in_and_tells_nothing() -> None:
    clocked = Clocked("1/minute")
    clocked.store.down = True

    response = await connect(build_on(clocked)).get("/items/1")

    assert response.status_code == 200
    assert "x-ratelimit-limit" not in response.headers


async def test_without_a_store_a_closed_limit_refuses_as_unavailable() -> None:
    clocked = Clocked("1/minute", on_outage="closed")
    clocked.store.down = True

    response = await connect(build_on(clocked), headers={"Accept": PROBLEM}).get("/items/1")

    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["code"] == "store_unavailable"
    assert response.json()["type"] == "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


async def test_a_header_that_is_no_text_limits_its_sender_like_any_other() -> None:
    app = build("1/minute")

    wires = [
        await Wire().run(app, http_scope("GET", "/items/1", (b"x-api-key", b"\xff\x00\r\n"), (b"accept", b"\xff")))
        for _ in range(2)
    ]

    assert [wire.status for wire in wires] == [200, 429]
