from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from http_middleware import ResilienceMiddleware, idempotent, install
from http_middleware.client_address import ClientAddress
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, RateLimitPolicy, RequestContextPolicy, Rule
from resilience.testing import ManualClock
from tests.integration.http_driver import Wire, connect, http_scope, upload


def limited(quota: str, **options: Any) -> Pipeline:
    return Pipeline([RateLimitPolicy(MemoryStore(clock=ManualClock()), Rule(quota, **options))])


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise RuntimeError("the database's password is 1234")


async def test_an_unhandled_exception_is_answered_with_a_500_that_carries_ids_and_raised_on() -> None:
    wire = Wire()

    with pytest.raises(RuntimeError, match="password"):
        await wire.run(ResilienceMiddleware(broken, Pipeline()), http_scope())

    assert wire.status == 500
    assert wire.headers["x-request-id"].startswith("req_")
    assert wire.headers["x-correlation-id"]
    assert wire.body == b'{"detail":"Internal Server Error"}'


async def test_an_exception_after_the_response_began_starts_no_second_one() -> None:
    async def breaks_late(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    wire = Wire()

    with pytest.raises(RuntimeError, match="late"):
        await wire.run(ResilienceMiddleware(breaks_late, Pipeline()), http_scope())

    assert [message["type"] for message in wire.sent] == ["http.response.start"]


@pytest.mark.parametrize("kind", ["lifespan", "something.new"])
async def test_what_is_neither_http_nor_websocket_passes_untouched(kind: str) -> None:
    scope: Scope = {"type": kind}
    handed_in: Message = {"type": f"{kind}.in"}
    handed_out: Message = {"type": f"{kind}.out"}
    got: list[Any] = []

    async def inner(inner_scope: Scope, receive: Receive, send: Send) -> None:
        got.extend((inner_scope, await receive()))
        await send(handed_out)

    wire = await Wire([handed_in]).run(ResilienceMiddleware(inner, limited("1/minute")), scope)

    assert got[0] is scope
    assert scope == {"type": kind}
    assert got[1] is handed_in
    assert wire.sent[0] is handed_out


async def test_the_lifespan_of_an_installed_application_runs_and_its_state_arrives() -> None:
    steps: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, str]]:
        steps.append("up")
        yield {"name": "state"}
        steps.append("down")

    app = FastAPI(lifespan=lifespan)
    install(app, Pipeline())
    scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}

    wire = await Wire([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]).run(app, scope)

    assert [message["type"] for message in wire.sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert steps == ["up", "down"]
    assert scope["state"] == {"name": "state"}


async def test_wrapped_twice_it_counts_once() -> None:
    pipeline = limited("2/minute")
    client = connect(ResilienceMiddleware(ResilienceMiddleware(hello, pipeline), pipeline))

    responses = [await client.get("/") for _ in range(3)]

    assert [response.headers["x-ratelimit-remaining"] for response in responses] == ["1", "0", "0"]
    assert [response.status_code for response in responses] == [200, 200, 429]


async def test_wrapped_twice_its_headers_stand_once() -> None:
    pipeline = limited("2/minute")

    response = await connect(ResilienceMiddleware(ResilienceMiddleware(hello, pipeline), pipeline)).get("/")

    names = [name for name, _ in response.headers.raw]
    assert len(names) == len(set(names))


async def test_installed_twice_it_counts_once() -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    pipeline = limited("2/minute")
    install(app, pipeline)
    install(app, pipeline)

    response = await connect(app).get("/")

    assert response.headers.get_list("x-ratelimit-remaining") == ["1"]
    assert len(response.headers.get_list("x-request-id")) == 1


async def test_added_inside_of_an_installed_application_it_counts_once() -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    pipeline = limited("2/minute")
    install(app, pipeline)
    app.add_middleware(ResilienceMiddleware, pipeline=pipeline)

    response = await connect(app).get("/")

    assert response.headers.get_list("x-ratelimit-remaining") == ["1"]


async def test_a_guarded_application_that_is_mounted_in_a_guarded_one_counts_once() -> None:
    pipeline = limited("2/minute")
    inner = FastAPI()
    inner.add_api_route("/hello", lambda: "hello")
    install(inner, pipeline)
    outer = FastAPI()
    outer.mount("/inner", inner)
    install(outer, pipeline)

    response = await connect(outer).get("/inner/hello")

    assert response.status_code == 200
    assert response.headers.get_list("x-ratelimit-remaining") == ["1"]
    assert len(response.headers.get_list("x-request-id")) == 1


async def test_the_limits_of_a_mounted_application_hold_in_one_that_only_gives_ids() -> None:
    inner = FastAPI()
    inner.add_api_route("/items/{item}", lambda item: item)
    install(inner, limited("1/minute", operations=["GET /items/{item}"]))
    outer = FastAPI()
    outer.mount("/inner", inner)
    install(outer, Pipeline())
    client = connect(outer)

    assert [(await client.get(f"/inner/items/{item}")).status_code for item in range(2)] == [200, 429]


async def test_the_keys_of_a_mounted_application_hold_in_one_that_only_limits() -> None:
    runs: list[str] = []
    inner = FastAPI()
    inner.add_api_route("/orders", lambda: runs.append("order"), methods=["POST"])
    install(inner, Pipeline([IdempotencyPolicy(MemoryStore())]))
    outer = FastAPI()
    outer.mount("/inner", inner)
    install(outer, limited("9/minute"))
    client = connect(outer, headers={"Idempotency-Key": "key_1"})

    responses = [await client.post("/inner/orders") for _ in range(2)]

    assert [response.headers["x-ratelimit-remaining"] for response in responses] == ["8", "7"]
    assert runs == ["order"]


async def test_added_as_middleware_it_limits_the_route_that_a_rule_names() -> None:
    app = FastAPI()
    app.add_api_route("/items/{item}", lambda item: item)
    app.add_api_route("/free", lambda: "free")
    app.add_middleware(ResilienceMiddleware, pipeline=limited("1/minute", operations=["GET /items/{item}"]))
    client = connect(app)

    statuses = [(await client.get(path)).status_code for path in ("/items/1", "/items/2", "/free", "/free")]

    assert statuses == [200, 429, 200, 200]


async def test_added_as_middleware_it_puts_ids_on_what_the_application_answers() -> None:
    app = FastAPI()
    app.add_middleware(ResilienceMiddleware, pipeline=Pipeline())

    response = await connect(app).get("/nowhere")

    assert response.status_code == 404
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_refusal_at_the_edge_keeps_the_request_from_the_applications_middleware() -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    reached: list[str] = []

    @app.middleware("http")
    async def expensive(request: Request, call_next: Any) -> Any:
        reached.append(request.url.path)
        return await call_next(request)

    limit = RateLimitPolicy(MemoryStore(clock=ManualClock()), "1/minute")
    install(app, Pipeline(edge=[RequestContextPolicy(), limit]))
    client = connect(app)

    responses = [await client.get("/") for _ in range(2)]

    assert [response.status_code for response in responses] == [200, 429]
    assert reached == ["/"]
    assert responses[1].headers["x-request-id"].startswith("req_")
    assert responses[1].headers["x-ratelimit-remaining"] == "0"


async def test_a_body_that_no_policy_asks_for_is_not_read_ahead() -> None:
    waiting: list[int] = []
    wire = Wire(upload(b"a", b"b"))

    async def lazy(scope: Scope, receive: Receive, send: Send) -> None:
        waiting.append(len(wire.waiting))
        await hello(scope, receive, send)

    await wire.run(ResilienceMiddleware(lazy, limited("9/minute")), http_scope("POST"))

    assert waiting == [2]


async def test_a_response_passes_message_by_message_as_the_application_sends_it() -> None:
    bodies: list[Message] = [
        {"type": "http.response.body", "body": b"a", "more_body": True},
        {"type": "http.response.body", "body": b"b", "more_body": False},
    ]

    async def streams(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for message in bodies:
            await send(message)

    wire = await Wire().run(ResilienceMiddleware(streams, limited("9/minute")), http_scope())

    assert wire.sent[1:] == bodies


async def test_a_client_that_is_gone_before_its_late_key_is_checked_is_no_error() -> None:
    runs: list[str] = []
    app = FastAPI()

    @app.post("/")
    @idempotent()
    async def pay() -> None:
        runs.append("paid")

    install(app)

    wire = await Wire([{"type": "http.disconnect"}]).run(app, http_scope("POST", "/", (b"idempotency-key", b"key_1")))

    assert (wire.status, runs) == (400, [])


async def test_a_request_without_a_peer_is_served() -> None:
    wire = await Wire().run(ResilienceMiddleware(hello, limited("9/minute")), {**http_scope(), "client": None})

    assert wire.status == 200


@pytest.mark.parametrize("added", [True, False])
async def test_an_address_behind_a_proxy_is_the_callers(added: bool) -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    address = ClientAddress(trusted=["10.0.0.0/8"])
    if added:
        app.add_middleware(ResilienceMiddleware, pipeline=limited("9/minute"), address=address)
    else:
        install(app, limited("9/minute"), address=address)
    client = connect(app, address="10.0.0.1")

    responses = [await client.get("/", headers={"X-Forwarded-For": one}) for one in ("5.5.5.5", "5.5.5.5", "6.6.6.6")]

    assert [response.headers["x-ratelimit-remaining"] for response in responses] == ["8", "7", "8"]


async def test_installed_without_a_pipeline_it_gives_ids_alone() -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    install(app)

    response = await connect(app).get("/")

    assert response.headers["x-request-id"].startswith("req_")
    assert "x-ratelimit-limit" not in response.headers


async def test_a_mounted_limit_says_once_when_to_retry() -> None:
    inner = FastAPI()
    inner.add_api_route("/hello", lambda: "hello")
    install(inner, limited("1/minute"))
    outer = FastAPI()
    outer.mount("/inner", inner)
    install(outer)
    client = connect(outer)

    responses = [await client.get("/inner/hello") for _ in range(2)]

    assert [response.headers.get_list("retry-after") for response in responses] == [[], ["60"]]


async def test_a_redirect_between_slashes_still_works() -> None:
    app = FastAPI()
    app.add_api_route("/items/", lambda: "items")
    install(app, limited("9/minute"))

    response = await connect(app).get("/items", follow_redirects=True)

    assert response.json() == "items"
