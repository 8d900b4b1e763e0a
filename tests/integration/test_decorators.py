"""Policies beside the handler: every style of endpoint, both doors, and what can go wrong when one decorates."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from http_middleware import install
from http_middleware.decorators import idempotent, rate_limit
from resilience import (
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Quota,
    RateLimitPolicy,
    set_context_user,
)
from resilience.decorators import rate_limit as core_rate_limit
from resilience.testing import ManualClock
from tests.integration.http_driver import Wire, connect, http_scope


def guarded(*routers: APIRouter, pipeline: Pipeline | None = None) -> FastAPI:
    app = FastAPI()
    for router in routers:
        app.include_router(router)
    install(app, pipeline or Pipeline())
    return app


async def statuses(app: Any, *paths: str, method: str = "GET", **more: Any) -> list[int]:
    async with connect(app) as client:
        return [(await client.request(method, path, **more)).status_code for path in paths]


router = APIRouter()


@router.get("/coroutine")
@rate_limit(max_requests=1, window_seconds=60)
async def coroutine() -> str:
    return "done"


@router.get("/plain")
@rate_limit(max_requests=1, window_seconds=60)
def plain() -> str:
    return "done"


@router.get("/with-request/{item}")
@rate_limit(max_requests=1, window_seconds=60)
async def with_request(request: Request, item: int) -> str:
    return f"{request.url.path} {item}"


@router.get("/streamed")
@rate_limit(max_requests=1, window_seconds=60)
async def streamed() -> AsyncIterator[dict[str, int]]:
    for n in range(3):
        yield {"n": n}


@router.get("/streamed-by-a-thread")
@rate_limit(max_requests=1, window_seconds=60)
def streamed_by_a_thread() -> Iterator[dict[str, int]]:
    for n in range(3):
        yield {"n": n}


@router.get("/streaming-response")
@rate_limit(max_requests=1, window_seconds=60)
async def streaming_response() -> StreamingResponse:
    return StreamingResponse(iter(["a", "b", "c"]))


class Shop:
    @rate_limit(max_requests=1, window_seconds=60)
    async def order(self, item: int) -> int:
        return item


router.add_api_route("/bound/{item}", Shop().order)


@pytest.mark.parametrize(
    "path",
    [
        "/coroutine",
        "/plain",
        "/with-request/1",
        "/streamed",
        "/streamed-by-a-thread",
        "/streaming-response",
        "/bound/1",
    ],
)
async def test_an_endpoint_of_any_style_is_limited_before_anything_leaves(path: str) -> None:
    async with connect(guarded(router)) as client:
        first, second = [await client.get(path) for _ in range(2)]
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining"] == "0"
    assert second.status_code == 429
    assert second.json() == {"detail": "Too many requests", "retry_after": 60}
    assert second.headers["retry-after"] == "60"
    assert second.headers["x-request-id"].startswith("req_")


async def test_what_an_endpoint_streams_is_whole() -> None:
    async with connect(guarded(router)) as client:
        lines = [(await client.get(path)).text for path in ("/streamed", "/streamed-by-a-thread")]
    assert [line.count('"n"') for line in lines] == [3, 3]


async def test_a_limit_counts_for_the_route_and_not_for_each_of_its_urls() -> None:
    assert await statuses(guarded(router), "/with-request/1", "/with-request/2", "/with-request/3") == [200, 429, 429]


async def test_a_router_under_two_prefixes_has_a_count_for_each() -> None:
    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2/{tenant}")
    install(app, Pipeline())
    assert await statuses(app, "/v1/coroutine", "/v2/a/coroutine", "/v1/coroutine", "/v2/b/coroutine") == [
        200, 200, 429, 429,
    ]  # fmt: skip


async def test_a_mounted_application_is_limited_and_answers_in_our_words() -> None:
    app = FastAPI()
    app.mount("/inner", guarded_inside := FastAPI())
    guarded_inside.include_router(router)
    install(app, Pipeline())
    async with connect(app) as client:
        replies = [await client.get("/inner/coroutine") for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 429]
    assert replies[1].json()["detail"] == "Too many requests"


async def test_a_starlette_route_is_limited() -> None:
    @rate_limit(1)
    async def endpoint(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("done")

    app = Starlette(routes=[Route("/", endpoint)])
    install(app, Pipeline())
    assert await statuses(app, "/", "/") == [200, 429]


async def test_stacked_limits_are_one_step_so_that_one_denies_at_no_cost_to_the_other() -> None:
    clock = ManualClock(1000.0)
    stacked = APIRouter()

    @stacked.get("/")
    @rate_limit("1/second")
    @rate_limit(Quota(3, per=3600))
    async def endpoint() -> None:
        return None

    app = guarded(stacked, pipeline=Pipeline(store=MemoryStore(clock=clock)))
    assert await statuses(app, *["/"] * 6) == [200] + [429] * 5
    clock.advance(1.5)
    assert await statuses(app, "/") == [200]
    clock.advance(1.5)
    assert await statuses(app, "/") == [200]


async def test_somebody_elses_decorator_between_two_of_ours_is_not_skipped() -> None:
    seen = []

    def notes(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(function)
        async def noting(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return await function(*args, **kwargs)

        return noting

    between = APIRouter()

    @between.get("/")
    @rate_limit(5)
    @notes
    @rate_limit(1)
    async def endpoint() -> None:
        return None

    assert await statuses(guarded(between), "/", "/") == [200, 429]
    assert len(seen) == 2


async def test_a_user_whom_a_dependency_found_has_a_quota_of_its_own() -> None:
    async def authenticate(request: Request) -> None:
        set_context_user(request.headers["x-user"])

    authenticated = APIRouter(dependencies=[Depends(authenticate)])

    @authenticated.get("/")
    @rate_limit(1)
    async def endpoint() -> None:
        return None

    app = guarded(authenticated)
    async with connect(app) as client:
        got = [(await client.get("/", headers={"x-user": user})).status_code for user in ("ann", "bob", "ann")]
    assert got == [200, 200, 429]


async def test_what_validation_refuses_is_not_counted() -> None:
    assert await statuses(guarded(router), "/with-request/no-number", "/with-request/1") == [422, 200]


keyed = APIRouter()
runs: list[int] = []


@keyed.post("/async", status_code=201)
@idempotent(ttl=86400, require_key=True)
async def keyed_async(request: Request, data: dict[str, int]) -> dict[str, int]:
    assert request.method == "POST"
    runs.append(1)
    return {**data, "run": len(runs)}


@keyed.post("/sync", status_code=201)
@rate_limit(100)
@idempotent(ttl=86400, require_key=True)
def keyed_sync(data: dict[str, int]) -> dict[str, int]:
    runs.append(1)
    return {**data, "run": len(runs)}


@pytest.mark.parametrize("path", ["/async", "/sync"])
@pytest.mark.parametrize("core", [False, True])
async def test_a_keyed_endpoint_runs_once_and_replays_status_and_bytes(path: str, core: bool) -> None:
    runs.clear()
    store = MemoryStore()
    app = guarded(keyed, pipeline=Pipeline([IdempotencyPolicy(store)] if core else (), store=store))
    async with connect(app) as client:
        first, again = [await client.post(path, json={"amount": 1}, headers={"idempotency-key": "k"}) for _ in range(2)]
        other = await client.post(path, json={"amount": 2}, headers={"idempotency-key": "k"})
        without = await client.post(path, json={"amount": 1})
    assert (first.status_code, again.status_code, other.status_code, without.status_code) == (201, 201, 422, 400)
    assert first.content == again.content
    assert again.headers["x-idempotent-replayed"] == "true"
    assert "x-idempotent-replayed" not in first.headers
    assert len(runs) == 1


async def test_decorators_use_the_store_of_the_pipelines_first_policy() -> None:
    store = MemoryStore()
    pipeline = Pipeline([RateLimitPolicy(store, "100/minute")])
    assert pipeline.store is store
    app = guarded(router, pipeline=pipeline)
    async with connect(app) as client:
        told = (await client.get("/coroutine")).headers["ratelimit"]
    assert told == '"100/minute";r=99;t=60, "1/minute GET /coroutine";r=0;t=60'


async def test_a_decorator_above_the_route_stops_the_start() -> None:
    above = APIRouter()

    @rate_limit(1)
    @above.get("/unprotected")
    async def endpoint() -> None:
        return None

    with pytest.raises(ConfigurationError, match=r"/unprotected.*below @app\.get"):
        await Wire().run(guarded(above), http_scope("GET", "/unprotected"))


async def test_a_direct_call_is_the_function_itself() -> None:
    assert await coroutine() == "done"
    assert plain() == "done"
    assert await Shop().order(3) == 3
    assert [item async for item in streamed()] == [{"n": n} for n in range(3)]
    assert list(streamed_by_a_thread()) == [{"n": n} for n in range(3)]


def test_a_value_out_of_range_is_told_where_it_is_written() -> None:
    with pytest.raises(ConfigurationError, match="limit must be a whole number"):
        rate_limit(0)
    with pytest.raises(ConfigurationError, match="share the name"):
        core_rate_limit("1/second and 5/minute", name="both")


def test_what_streams_can_not_be_kept() -> None:
    with pytest.raises(ConfigurationError, match="streams its replies"):

        @idempotent()
        async def endpoint() -> AsyncIterator[int]:
            yield 1
