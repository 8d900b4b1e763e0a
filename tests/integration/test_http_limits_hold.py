"""Where other limiters for FastAPI let requests through, lock callers out or break replies, ours keeps its promises.

Every limit here guards the same routes three times: in the application itself, in a router that is included through
another one, and in a mounted application.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import cycle, islice
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from http_middleware import ResilienceMiddleware, idempotent, install, rate_limit
from http_middleware.client_address import ClientAddress
from resilience import MemoryStore, Pipeline, Quota, RateLimitPolicy, Rule
from resilience.testing import ManualClock
from tests.integration.http_driver import Wire, connect, http_scope

PREFIXES = {"direct": "", "included": "/v1/acme", "mounted": "/inner/deep"}
TEMPLATES = {"": "", "/v1/acme": "/v1/{tenant}", "/inner/deep": "/inner/deep"}
HEADERS = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "ratelimit", "ratelimit-policy")
each_prefix = pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)

each_decorated = pytest.mark.parametrize(
    "prefix",
    [
        pytest.param("", id="direct"),
        pytest.param("/v1/acme", id="included"),
        pytest.param("/inner/deep", id="mounted"),
    ],
)


def site(router: APIRouter, pipeline: Pipeline, *, factory: type[FastAPI] = FastAPI, **options: Any) -> FastAPI:
    """Guard an application that has a router in all three places."""
    app = within(router, factory)
    install(app, pipeline, **options)
    return app


def within(router: APIRouter, factory: type[FastAPI] = FastAPI) -> FastAPI:
    inner = FastAPI()
    inner.include_router(router, prefix="/deep")
    tenant = APIRouter()
    tenant.include_router(router, prefix="/{tenant}")
    app = factory()
    app.include_router(router)
    app.include_router(tenant, prefix="/v1")
    app.mount("/inner", inner)
    return app


def clocked(*rules: Rule | str) -> tuple[Pipeline, ManualClock]:
    """Return a pipeline of one rate limit, if any, and the clock that it and decorators go by."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    return Pipeline([RateLimitPolicy(store, rules)] if rules else (), store=store), clock


def plain() -> APIRouter:
    """Return routes that no decorator limits."""
    router = APIRouter()

    @router.get("/items/{item}")
    async def read(item: int) -> int:
        return item

    @router.get("/forbidden")
    async def forbidden() -> None:
        raise HTTPException(403)

    @router.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    return router


def decorated(*limits: Callable[[Any], Any]) -> APIRouter:
    """Return a route with a path parameter, its endpoint limited by each of ``limits``; it takes no request."""

    async def read(item: int) -> int:
        return item

    for limit in limits:
        read = limit(read)
    router = APIRouter()
    router.add_api_route("/items/{item}", read)
    return router


async def statuses(app: ASGIApp, *paths: str, **options: Any) -> list[int]:
    async with connect(app, **options) as client:
        return [(await client.get(path)).status_code for path in paths]


def by_install(pipeline: Pipeline) -> FastAPI:
    return site(plain(), pipeline)


def by_add_middleware(pipeline: Pipeline) -> FastAPI:
    app = within(plain())
    app.add_middleware(ResilienceMiddleware, pipeline=pipeline)
    return app


# -- nothing slips through


@each_prefix
@pytest.mark.parametrize("build", [by_install, by_add_middleware])
async def test_a_limit_for_everything_holds_on_included_routers_and_mounted_applications(
    build: Callable[[Pipeline], FastAPI], prefix: str
) -> None:
    app = build(clocked("2/minute")[0])

    assert await statuses(app, *[f"{prefix}/items/{n}" for n in range(4)]) == [200, 200, 429, 429]


@each_prefix
async def test_a_limit_for_one_route_holds_where_the_route_is_included_or_mounted_and_nowhere_else(prefix: str) -> None:
    named = f"GET {TEMPLATES[prefix]}/items/{{item}}"
    app = site(plain(), clocked(Rule("2/minute", operations=[named]))[0])

    assert await statuses(app, *[f"{prefix}/items/{n}" for n in range(3)]) == [200, 200, 429]
    for other in PREFIXES.values():
        if other != prefix:
            assert await statuses(app, *[f"{other}/items/{n}" for n in range(3)]) == [200, 200, 200]


@each_prefix
async def test_a_decorated_endpoint_is_limited_wherever_its_router_is_included_or_mounted(prefix: str) -> None:
    app = site(decorated(rate_limit(max_requests=2, window_seconds=60)), Pipeline())

    assert await statuses(app, *[f"{prefix}/items/1"] * 4) == [200, 200, 429, 429]


@each_prefix
async def test_a_count_belongs_to_the_template_of_a_route_and_not_to_each_url(prefix: str) -> None:
    urls = [f"{prefix}/items/{n}?page={n}" for n in range(6)]

    for app in (
        site(decorated(rate_limit("2/minute")), Pipeline()),
        site(plain(), clocked(Rule("2/minute", operations=[f"GET {TEMPLATES[prefix]}/items/{{item}}"]))[0]),
    ):
        assert await statuses(app, *urls) == [200, 200, 429, 429, 429, 429]


def ambiguous(*paths: str) -> APIRouter:
    """Return routes that match one and the same URL, in this order."""
    router = APIRouter()
    for path in paths:
        router.add_api_route(path, saying(path))
    return router


def saying(text: str) -> Callable[[], Awaitable[str]]:
    async def say() -> str:
        return text

    return say


@each_prefix
@pytest.mark.parametrize("paths", [("/items/best", "/items/{item}"), ("/items/{item}", "/items/best")])
async def test_of_two_routes_that_match_the_limit_is_the_one_of_the_first_which_answers(
    prefix: str, paths: tuple[str, str]
) -> None:
    template = TEMPLATES[prefix]
    first, second = (
        Rule(f"{limit}/minute", operations=[f"GET {template}{path}"]) for limit, path in zip((2, 9), paths, strict=True)
    )
    async with connect(site(ambiguous(*paths), clocked(first, second)[0])) as client:
        replies = [await client.get(f"{prefix}/items/best") for _ in range(3)]

    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert {reply.headers["x-ratelimit-limit"] for reply in replies} == {"2"}
    assert replies[0].json() == paths[0]


class Watched(FastAPI):
    """Counts how often its routes are looked at."""

    looks = 0

    @property
    def routes(self) -> list[BaseRoute]:
        self.looks += 1
        return super().routes


async def test_the_routes_are_read_once_and_not_for_each_request() -> None:
    pipeline, _ = clocked(Rule("1000/minute", operations=["GET /v1/{tenant}/items/{item}"]))
    app = site(plain(), pipeline, factory=Watched)
    assert isinstance(app, Watched)
    await statuses(app, "/v1/acme/items/1")
    looks = app.looks

    await statuses(app, *[f"{prefix}/items/1" for prefix in PREFIXES.values()] * 20, "/nowhere")

    assert looks > 0
    assert app.looks == looks


# -- each caller has what is its own, and no more


@each_prefix
@pytest.mark.parametrize("declared", ["policy", "decorator"])
async def test_clients_at_different_addresses_have_buckets_of_their_own(prefix: str, declared: str) -> None:
    app = (
        site(plain(), clocked("1/minute")[0])
        if declared == "policy"
        else site(decorated(rate_limit("1/minute")), Pipeline())
    )
    url = f"{prefix}/items/1"

    answers = [await statuses(app, url, url, address=f"192.0.2.{n}") for n in range(4)]

    assert answers == [[200, 429]] * 4


async def rotated(app: FastAPI, name: str, value: str, **options: Any) -> list[int]:
    """Return the answers to five requests, each of which names another address."""
    async with connect(app, **options) as client:
        return [(await client.get("/items/1", headers={name: value.format(n)})).status_code for n in range(5)]


CLAIMS = [
    ("X-Forwarded-For", "198.51.100.{}"),
    ("X-Forwarded-For", "198.51.100.{}, 203.0.113.9"),
    ("Forwarded", "for=198.51.100.{}"),
    ("X-Real-IP", "198.51.100.{}"),
    ("True-Client-IP", "198.51.100.{}"),
    ("CF-Connecting-IP", "198.51.100.{}"),
]


@pytest.mark.parametrize(("name", "value"), CLAIMS)
async def test_naming_another_address_in_each_request_changes_nothing(name: str, value: str) -> None:
    assert await rotated(site(plain(), clocked("2/minute")[0]), name, value) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("address", [ClientAddress(trusted=["10.0.0.0/8"]), ClientAddress(hops=1)])
async def test_behind_a_proxy_a_client_can_not_choose_the_address_that_it_is_counted_for(
    address: ClientAddress,
) -> None:
    app = site(plain(), clocked("2/minute")[0], address=address)
    forged = "198.51.100.{}, 203.0.113.9"  # the proxy appends what it saw

    assert await rotated(app, "X-Forwarded-For", forged, address="10.0.0.1") == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("address", [ClientAddress(trusted=["10.0.0.0/8"]), ClientAddress(hops=1)])
async def test_behind_a_proxy_each_client_has_a_bucket_of_its_own(address: ClientAddress) -> None:
    app = site(plain(), clocked("1/minute")[0], address=address)

    assert await rotated(app, "X-Forwarded-For", "203.0.113.{}", address="10.0.0.1") == [200] * 5
    assert await rotated(app, "X-Forwarded-For", "203.0.113.{}", address="10.0.0.1") == [429] * 5


async def test_who_comes_past_the_proxy_is_counted_for_its_own_address() -> None:
    app = site(plain(), clocked("2/minute")[0], address=ClientAddress(trusted=["10.0.0.0/8"]))

    assert await rotated(app, "X-Forwarded-For", "203.0.113.{}", address="198.51.100.1") == [200, 200, 429, 429, 429]


@each_decorated
async def test_each_decorated_route_has_a_count_of_its_own(prefix: str) -> None:
    router = APIRouter()
    for name in ("/one", "/two"):
        router.add_api_route(name, rate_limit("1/minute")(saying(name)))
    app = site(router, Pipeline())

    assert await statuses(app, *[prefix + name for name in ("/one", "/two", "/one", "/two")]) == [200, 200, 429, 429]


@each_decorated
async def test_one_key_at_two_decorated_routes_is_two_operations(prefix: str) -> None:
    router = APIRouter()
    for name in ("/one", "/two"):
        router.add_api_route(name, idempotent()(saying(name)), methods=["POST"])
    async with connect(site(router, Pipeline()), headers={"idempotency-key": "k"}) as client:
        replies = [await client.post(prefix + name) for name in ("/one", "/two", "/one", "/two")]

    assert [reply.json() for reply in replies] == ["/one", "/two", "/one", "/two"]
    assert [reply.headers.get("x-idempotent-replayed") for reply in replies] == [None, None, "true", "true"]


@each_decorated
async def test_limits_that_are_stacked_on_one_route_are_counted_apart(prefix: str) -> None:
    app = site(decorated(rate_limit("5/hour"), rate_limit("3/minute")), clocked()[0])
    async with connect(app) as client:
        replies = [await client.get(f"{prefix}/items/{n}") for n in range(4)]

    operation = f"GET {TEMPLATES[prefix]}/items/{{item}}"
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["ratelimit"] for reply in replies[:3]] == [
        f'"5/hour {operation}";r={left + 2};t=3600, "3/minute {operation}";r={left};t=60' for left in (2, 1, 0)
    ]


# -- denials cost nothing, and no window holds more than the limit


@each_prefix
async def test_what_a_stacked_limit_denies_burns_nothing_of_the_other(prefix: str) -> None:
    pipeline, clock = clocked()
    app = site(decorated(rate_limit("10/hour"), rate_limit("1/second")), pipeline)
    url = f"{prefix}/items/1"

    for _ in range(10):
        assert await statuses(app, *[url] * 10) == [200] + [429] * 9
        clock.advance(1.001)
    assert await statuses(app, url) == [429]  # the hour's ten are used, by those who were let in


@each_prefix
@pytest.mark.parametrize("algorithm", ["sliding_window", "sliding_log", "token_bucket", "fixed_window"])
async def test_who_hammers_is_let_in_as_soon_as_retry_after_says(algorithm: Any, prefix: str) -> None:
    pipeline, clock = clocked()
    burst = 3 if algorithm == "token_bucket" else None
    app = site(decorated(rate_limit(Quota(3, per=60, algorithm=algorithm, burst=burst))), pipeline)
    url = f"{prefix}/items/1"
    async with connect(app) as client:
        while (reply := await client.get(url)).status_code == 200:
            pass
        free_at = clock.now + int(reply.headers["retry-after"])
        while clock.now < free_at - 1:
            assert {(await client.get(url)).status_code for _ in range(5)} == {429}
            clock.advance(1)
        clock.now = free_at
        assert (await client.get(url)).status_code == 200


@pytest.mark.parametrize("start", [0.0, 58.9, 59.999, 60.0])
async def test_a_burst_at_a_boundary_never_puts_more_than_the_limit_into_any_window(start: float) -> None:
    pipeline, clock = clocked("10/minute")
    clock.now = 6000 + start
    admitted: list[float] = []
    steps = cycle([0.0, 0.0, 0.0, 0.001, 0.0, 7.3, 0.0, 0.0, 0.999, 0.0, 29.0, 1.0])
    app = site(plain(), pipeline)
    for step in [0.0] * 12 + list(islice(steps, 240)):
        clock.advance(step)
        if (await Wire().run(app, http_scope("GET", "/items/1"))).status == 200:
            admitted.append(clock.now)

    assert len(admitted) > 50
    for at in admitted:
        assert sum(at <= other < at + 60 for other in admitted) <= 10


async def test_a_bucket_with_a_short_refill_limits_from_the_first_request_on() -> None:
    pipeline, clock = clocked(Rule(Quota(100, per=1, algorithm="token_bucket", burst=3)))
    app = site(plain(), pipeline)

    assert await statuses(app, *["/items/1"] * 6) == [200] * 3 + [429] * 3
    clock.advance(0.01)
    assert await statuses(app, *["/items/1"] * 2) == [200, 429]


async def test_any_number_of_callers_takes_bounded_memory_and_frees_nobody_who_is_limited() -> None:
    clock = ManualClock()
    store = MemoryStore(max_subjects=50, clock=clock)
    app = site(decorated(rate_limit("2/hour")), Pipeline([RateLimitPolicy(store, "2/minute")]))
    victim = http_scope("GET", "/items/1", (b"x-api-key", b"victim"))
    assert [(await Wire().run(app, {**victim})).status for _ in range(3)] == [200, 200, 429]

    for n in range(1000):
        clock.advance(0.001)
        scope = http_scope("GET", "/v1/acme/items/1", (b"x-api-key", b"%d" % n))
        assert (await Wire().run(app, scope)).status == 200
        assert len(store._counts) <= 50

    assert (await Wire().run(app, {**victim})).status == 429


# -- replies stay whole, and say what they must


@each_prefix
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/items/1", 200),
        ("GET", "/nowhere", 404),
        ("DELETE", "/items/1", 405),
        ("GET", "/items/many", 422),
        ("GET", "/forbidden", 403),
        ("GET", "/broken", 500),
    ],
)
async def test_every_reply_of_every_router_tells_its_limits_once(
    prefix: str, method: str, path: str, status: int
) -> None:
    async with connect(site(plain(), clocked("5/minute")[0])) as client:
        reply = await client.request(method, prefix + path)

    assert reply.status_code == status
    assert [reply.headers.get_list(name) for name in HEADERS] == [
        ["5"], ["4"], ["60"], ['"5/minute";r=4;t=60'], ['"5/minute";q=5;w=60'],
    ]  # fmt: skip


def ids_of(reply: httpx.Response) -> list[str]:
    (request_id,), (correlation_id,) = (reply.headers.get_list(name) for name in ("x-request-id", "x-correlation-id"))
    assert request_id.startswith("req_")
    return [request_id, correlation_id]


@each_prefix
@pytest.mark.parametrize("declared", ["policy", "decorator"])
async def test_a_denial_keeps_its_ids_its_limits_and_when_to_come_back(prefix: str, declared: str) -> None:
    pipeline, clock = clocked(*(["1/minute"] if declared == "policy" else []))
    app = site(plain() if declared == "policy" else decorated(rate_limit("1/minute")), pipeline)
    async with connect(app, headers={"x-correlation-id": "order-7"}) as client:
        first = await client.get(f"{prefix}/items/1")
        clock.advance(14.5)
        denied = await client.get(f"{prefix}/items/1")

    assert (first.status_code, denied.status_code) == (200, 429)
    assert denied.json() == {"detail": "Too many requests", "retry_after": 46}
    assert denied.headers.get_list("retry-after") == ["46"]
    assert [denied.headers.get_list(name) for name in HEADERS[:3]] == [["1"], ["0"], ["46"]]
    assert ids_of(denied)[1] == ids_of(first)[1] == "order-7"
    assert ids_of(denied)[0] != ids_of(first)[0]


def streaming() -> APIRouter:
    router = APIRouter()

    @router.get("/response")
    @rate_limit(1)
    async def response() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b", "c"]))

    @router.get("/generator")
    @rate_limit(1)
    async def generator() -> AsyncIterator[int]:
        for n in range(3):
            yield n

    @router.get("/undecorated")
    async def undecorated() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b", "c"]))

    return router


@each_prefix
@pytest.mark.parametrize("path", ["/response", "/generator", "/undecorated"])
async def test_a_streamed_reply_starts_once_and_leaves_piece_by_piece(prefix: str, path: str) -> None:
    app = site(streaming(), clocked("1/minute")[0])

    wire, denied = [await Wire().run(app, http_scope("GET", prefix + path)) for _ in range(2)]

    kinds = [message["type"] for message in wire.sent]
    pieces = [message for message in wire.sent if message.get("body")]
    assert kinds.count("http.response.start") == 1
    assert kinds[0] == "http.response.start"
    assert len(pieces) >= 3
    assert (wire.status, wire.headers.get_list("x-ratelimit-limit")) == (200, ["1"])
    assert (denied.status, [message["type"] for message in denied.sent].count("http.response.start")) == (429, 1)


async def test_an_endpoint_needs_no_request_and_its_schema_shows_nothing_of_its_limit() -> None:
    router = decorated(rate_limit("5/minute"), rate_limit("1/second"))
    endpoint: Any = router.routes[0].endpoint  # type: ignore[attr-defined] # it is an APIRoute
    bare, limited = FastAPI(), FastAPI()
    bare.include_router(decorated())
    limited.include_router(router)
    install(limited, Pipeline())

    operations = [app.openapi()["paths"]["/items/{item}"]["get"] for app in (bare, limited)]

    assert list(inspect.signature(endpoint).parameters) == ["item"]
    assert operations[0]["parameters"] == operations[1]["parameters"]
    assert await statuses(limited, "/items/1", "/items/1") == [200, 429]
