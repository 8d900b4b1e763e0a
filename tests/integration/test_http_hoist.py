"""``app.add_middleware(...)``, in whichever order: each stage finds its place."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import permutations
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware import (
    IdempotencyMiddleware,
    RateLimitMiddleware,
    RequestContextMiddleware,
    ResilienceMiddleware,
    install,
    rate_limit,
)
from http_middleware.core import CoreMiddleware
from http_middleware.edge import EdgeMiddleware
from http_middleware.hoist import chain
from resilience import (
    ConfigurationError,
    HealthChecker,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    RequestContextPolicy,
    Rule,
    get_request_context,
    get_request_id,
    set_context_user,
)
from resilience.settings import Settings
from tests.integration.http_driver import Wire, connect, dial, http_scope, serving, websocket_scope, within

KEY = {"Idempotency-Key": "key_1"}
LIMITED = Settings(rate_limit_requests=9, redis_url=None)
OURS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (RequestContextMiddleware, {}),
    (RateLimitMiddleware, {"settings": LIMITED}),
    (IdempotencyMiddleware, {"settings": LIMITED}),
)


class Named(BaseUser):
    """A user who has an identity, and a name that others may have, too."""

    def __init__(self, identity: str) -> None:
        self._identity = identity

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return "John"

    @property
    def identity(self) -> str:
        return self._identity


class Nameless(Named):
    """As Starlette's base class leaves it."""

    @property
    def identity(self) -> str:
        raise NotImplementedError


class Backend(AuthenticationBackend):
    def __init__(self, user: type[Any] = Named) -> None:
        self._user = user

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        name = conn.headers.get("x-user")
        return None if name is None else (AuthCredentials(), self._user(name))


class Opaque:
    """Somebody else's middleware, which does not show what it has inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._inner = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._inner(scope, receive, send)


async def by_hand(request: Request, call_next: Any) -> Any:
    set_context_user(request.headers.get("x-user"))
    return await call_next(request)


def of_functions(app: FastAPI) -> None:
    app.middleware("http")(by_hand)


def of_starlette(app: FastAPI) -> None:
    app.add_middleware(AuthenticationMiddleware, backend=Backend())


async def hello() -> str:
    return "hello"


class Shop:
    """An application whose handlers tell what they know."""

    def __init__(self, **options: Any) -> None:
        self.runs: list[str | None] = []
        self.app = FastAPI(**options)
        self.app.add_api_route("/broken", self.broken)
        self.app.add_api_route("/orders", self.order, methods=["POST"])
        self.app.add_api_route("/items/{item}", self.item)

    async def broken(self) -> None:
        raise RuntimeError("the database's password is 1234")

    async def order(self) -> int:
        self.runs.append(get_request_context().user_id)
        return len(self.runs)

    async def item(self, item: int) -> int:
        return item


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run the application's lifespan around a client, as a server does."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    inbox.put_nowait({"type": "lifespan.startup"})
    life = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
    assert (await within(outbox.get()))["type"] == "lifespan.startup.complete"
    yield connect(app)
    inbox.put_nowait({"type": "lifespan.shutdown"})
    await within(life)


def assert_ids(response: httpx.Response) -> None:
    assert len(response.headers.get_list("x-request-id")) == 1
    assert response.headers["x-request-id"].startswith("req_")
    assert len(response.headers.get_list("x-correlation-id")) == 1


def stages(app: Starlette) -> tuple[int, int]:
    """Count the edges and the cores in a stack."""
    links = list(chain(app.middleware_stack))
    return tuple(sum(isinstance(link, kind) for link in links) for kind in (EdgeMiddleware, CoreMiddleware))  # type: ignore[return-value]


async def test_installed_the_first_request_of_a_process_may_break_and_carries_ids() -> None:
    shop = Shop()
    install(shop.app)

    response = await connect(shop.app).get("/broken")

    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert_ids(response)


@pytest.mark.parametrize(("kind", "options"), OURS)
async def test_added_under_a_lifespan_the_first_request_of_a_process_may_break_and_carries_ids(
    kind: Any, options: dict[str, Any]
) -> None:
    shop = Shop()
    shop.app.add_middleware(kind, **options)
    of_functions(shop.app)

    async with started(shop.app) as client:
        response = await client.get("/broken")

    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert_ids(response)


@pytest.mark.parametrize("outside", [None, CORSMiddleware])
async def test_added_without_a_lifespan_the_first_request_of_a_process_may_break_and_carries_ids(
    outside: Any,
) -> None:
    shop = Shop()
    shop.app.add_middleware(RequestContextMiddleware)
    if outside is not None:
        shop.app.add_middleware(outside, allow_origins=["*"])
    client = connect(shop.app)

    responses = [await client.get("/broken", headers={"Origin": "http://shop"}) for _ in range(2)]

    for response in responses:
        assert (response.status_code, response.text) == (500, "Internal Server Error")
        assert_ids(response)
    assert ("access-control-allow-origin" in responses[0].headers) is (outside is not None)


async def test_an_exception_without_a_lifespan_is_raised_on_once_to_the_server() -> None:
    shop = Shop()
    shop.app.add_middleware(RequestContextMiddleware)
    wire = Wire()

    with pytest.raises(RuntimeError, match="password"):
        await wire.run(shop.app, http_scope("GET", "/broken"))

    assert wire.status == 500
    assert [message["type"] for message in wire.sent] == ["http.response.start", "http.response.body"]


async def test_an_error_page_of_the_applications_own_is_answered_by_nobody_else() -> None:
    """By a handler, by a middleware, or in debug mode: on the first request, too."""
    handled, caught, debugged = Shop(), Shop(), Shop(debug=True)
    for shop in (handled, caught, debugged):
        shop.app.add_middleware(RequestContextMiddleware)

    @handled.app.exception_handler(Exception)
    async def sorry(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"sorry": True}, 500)

    @caught.app.middleware("http")
    async def catch(request: Request, call_next: Any) -> Any:
        try:
            return await call_next(request)
        except RuntimeError:
            return JSONResponse({"sorry": True}, 500)

    for shop in (handled, caught):
        client = connect(shop.app)
        assert [(await client.get("/broken")).json() for _ in range(2)] == [{"sorry": True}] * 2
    assert "Traceback" in (await connect(debugged.app).get("/broken")).text


@pytest.mark.parametrize("put_in", [install, lambda app: app.add_middleware(RequestContextMiddleware)])
async def test_the_applications_own_handler_of_exceptions_sees_the_ids_and_its_answer_carries_them(
    put_in: Callable[[FastAPI], None],
) -> None:
    shop = Shop()
    put_in(shop.app)

    @shop.app.exception_handler(Exception)
    async def sorry(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"id": get_request_id()}, 500)

    async with started(shop.app) as client:
        response = await client.get("/broken")

    assert_ids(response)
    assert response.json() == {"id": response.headers["x-request-id"]}


async def test_the_servers_access_log_has_the_ids(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    shop.app.add_middleware(RequestContextMiddleware)
    of_functions(shop.app)
    logged: list[str | None] = []
    caplog.set_level("INFO", "uvicorn.access")

    def note(record: logging.LogRecord) -> bool:
        if record.name == "uvicorn.access":
            logged.append(get_request_id())
        return True

    caplog.handler.addFilter(note)

    async with serving(shop.app) as port, dial(port) as client:
        response = await client.get("/broken")

    assert logged == [response.headers["x-request-id"]]


@pytest.mark.parametrize("put_in", [install, lambda app: app.add_middleware(RequestContextMiddleware)])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/items/x", 422), ("GET", "/nowhere", 404), ("DELETE", "/orders", 405), ("PUT", "/body", 413)],
)
async def test_what_the_framework_answers_itself_carries_ids(
    put_in: Callable[[FastAPI], None], method: str, path: str, status: int
) -> None:
    shop = Shop(max_body_size=4)

    @shop.app.put("/body")
    async def body(request: Request) -> int:
        return len(await request.body())

    put_in(shop.app)

    async with started(shop.app) as client:
        response = await client.request(method, path, content=b"too much" if method == "PUT" else None)

    assert response.status_code == status
    assert_ids(response)


@pytest.mark.parametrize("auth", [of_functions, of_starlette])
@pytest.mark.parametrize("lifespan", [True, False])
@pytest.mark.parametrize("order", list(permutations(range(4))), ids=lambda order: "".join(map(str, order)))
async def test_in_any_order_there_is_one_set_of_headers_the_users_own_quota_and_no_double_charge(
    order: tuple[int, ...], lifespan: bool, auth: Callable[[FastAPI], None]
) -> None:
    shop = Shop()
    for which in order:
        if which == len(OURS):
            auth(shop.app)
        else:
            shop.app.add_middleware(OURS[which][0], **OURS[which][1])

    async def exchange(client: httpx.AsyncClient) -> list[httpx.Response]:
        sent = [("alice", "key_1"), ("alice", "key_1"), ("bob", "key_1"), ("bob", "key_2")]
        return [await client.post("/orders", headers={"X-User": user, "Idempotency-Key": key}) for user, key in sent]

    if lifespan:
        async with started(shop.app) as client:
            responses = await exchange(client)
    else:
        responses = await exchange(connect(shop.app))

    assert [response.json() for response in responses] == [1, 1, 2, 3]
    assert shop.runs == ["alice", "bob", "bob"]
    assert [response.headers.get("x-idempotent-replayed") for response in responses] == [None, "true", None, None]
    assert [response.headers.get_list("x-ratelimit-remaining") for response in responses] == [
        ["8"],
        ["7"],
        ["8"],
        ["7"],
    ]
    for response in responses:
        names = [name for name, _ in response.headers.raw]
        assert len(names) == len(set(names))
        assert_ids(response)
    assert stages(shop.app) == (1, 1)


@pytest.mark.parametrize("kinds", list(permutations((RateLimitMiddleware, IdempotencyMiddleware))))
async def test_a_limit_is_asked_before_a_key_in_whichever_order_they_were_added(kinds: tuple[Any, ...]) -> None:
    shop = Shop()
    for kind in kinds:
        shop.app.add_middleware(kind, settings=Settings(rate_limit_requests=1, redis_url=None))
    client = connect(shop.app)

    statuses = [(await client.post("/orders", headers=KEY)).status_code for _ in range(2)]

    assert statuses == [200, 429]


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=lambda order: "".join(map(str, order)))
async def test_beside_an_installed_pipeline_each_is_asked_once_on_one_admission(order: tuple[int, ...]) -> None:
    shop = Shop()
    own = Pipeline([RateLimitPolicy(MemoryStore(), "50/minute")])
    for which in order:
        if which == len(OURS):
            install(shop.app, own)
        else:
            shop.app.add_middleware(OURS[which][0], **OURS[which][1])
    client = connect(shop.app)

    responses = [await client.post("/orders", headers=KEY) for _ in range(2)]

    assert [response.json() for response in responses] == [1, 1]
    assert [response.headers["ratelimit"].count(";r=") for response in responses] == [2, 2]
    assert {part for part in responses[1].headers["ratelimit"].split(";") if part.startswith("r=")} == {"r=48", "r=7"}
    for response in responses:
        names = [name for name, _ in response.headers.raw]
        assert len(names) == len(set(names))
    assert stages(shop.app) == (1, 1)


async def test_a_stack_that_is_built_anew_asks_each_policy_once() -> None:
    for put_in in (install, lambda _app: None):
        shop = Shop()
        put_in(shop.app)
        shop.app.add_middleware(RateLimitMiddleware, settings=LIMITED)
        await connect(shop.app).post("/orders")
        shop.app.middleware_stack = None

        response = await connect(shop.app).post("/orders")

        assert response.headers["ratelimit"].count(";r=") == 1
        assert stages(shop.app) == (1, 1)


async def test_decorators_count_in_the_store_that_was_given_whatever_else_is_added() -> None:
    store = MemoryStore()

    class Shared:
        """Another store than memory, as far as anybody can see."""

        def __init__(self) -> None:
            self.acquired: list[str] = []

        async def acquire(self, wants: Any) -> Any:
            self.acquired += [want.rule for want in wants]
            return await store.acquire(wants)

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    for with_install in (True, False):
        shared: Any = Shared()

        class OnRedis(Settings):
            def store(self, made: Any = shared) -> Any:
                return made

        shop = Shop()
        shop.app.add_api_route("/limited", rate_limit(5, name="decorated")(hello))
        shop.app.add_middleware(RateLimitMiddleware, settings=OnRedis(redis_url=None))
        shop.app.add_middleware(RequestContextMiddleware)
        if with_install:
            install(shop.app)

        await connect(shop.app).get("/limited")

        assert shared.acquired[1:] == ["decorated"]


@pytest.mark.parametrize(("user", "known"), [(Named, "7"), (SimpleUser, "7"), (Nameless, None)])
async def test_the_user_is_known_by_what_no_two_users_share(user: type[Any], known: str | None) -> None:
    shop = Shop()
    shop.app.add_middleware(AuthenticationMiddleware, backend=Backend(user))
    shop.app.add_middleware(RequestContextMiddleware)

    await connect(shop.app).post("/orders", headers={"X-User": "7"})

    assert shop.runs == [known]


async def test_a_user_whom_the_application_named_stays() -> None:
    shop = Shop()
    of_functions(shop.app)
    shop.app.add_middleware(AuthenticationMiddleware, backend=Backend(lambda name: Named(f"other than {name}")))  # type: ignore[arg-type]
    shop.app.add_middleware(RequestContextMiddleware)

    await connect(shop.app).post("/orders", headers={"X-User": "7"})

    assert shop.runs == ["7"]


async def test_who_is_not_authenticated_is_counted_by_address() -> None:
    shop = Shop()
    of_starlette(shop.app)
    shop.app.add_middleware(RateLimitMiddleware, settings=LIMITED)

    await connect(shop.app, address="10.0.0.1").post("/orders")
    again = await connect(shop.app, address="10.0.0.1").post("/orders")
    other = await connect(shop.app, address="10.0.0.2").post("/orders")

    assert shop.runs == [None] * 3
    assert [response.headers["x-ratelimit-remaining"] for response in (again, other)] == ["7", "8"]


@pytest.mark.parametrize("order", list(permutations(range(3))))
async def test_behind_what_does_not_show_its_inside_each_is_still_asked_once(order: tuple[int, ...]) -> None:
    shop = Shop()
    added: list[tuple[Any, dict[str, Any]]] = [(Opaque, {}), OURS[1], OURS[2]]
    for which in order:
        shop.app.add_middleware(added[which][0], **added[which][1])

    async with started(shop.app) as client:
        responses = [await client.post("/orders", headers=KEY) for _ in range(2)]
        broken = await client.get("/broken")

    assert [response.json() for response in responses] == [1, 1]
    assert responses[0].headers.get_list("x-ratelimit-remaining") == ["8"]
    # Where a key is asked for further out than a limit can be, its replays are free.
    assert responses[1].headers.get_list("x-ratelimit-remaining") in (["7"], [])
    assert_ids(broken)


async def test_a_websocket_is_limited_and_carries_ids_and_needs_no_key() -> None:
    app = FastAPI()

    @app.websocket("/room")
    async def room(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app.add_middleware(RateLimitMiddleware, settings=Settings(rate_limit_requests=1, redis_url=None))
    app.add_middleware(IdempotencyMiddleware, required=True, settings=LIMITED)

    wires = [
        await Wire([{"type": "websocket.connect"}]).run(app, websocket_scope("/room", extensions=extensions))
        for extensions in ((), (), ("websocket.http.response",))
    ]

    accepted, closed, refused = wires
    names = [name for name, _ in accepted.sent[0]["headers"]]
    assert (accepted.sent[0]["type"], names.count(b"x-request-id")) == ("websocket.accept", 1)
    assert [message["type"] for message in closed.sent] == ["websocket.close"]
    assert refused.status == 429


async def test_a_required_key_is_asked_for_where_there_are_side_effects() -> None:
    shop = Shop()
    shop.app.add_middleware(IdempotencyMiddleware, required=True, settings=LIMITED)
    client = connect(shop.app)

    assert (await client.post("/orders")).status_code == 400
    assert (await client.get("/items/1")).status_code == 200
    assert (await client.post("/orders", headers=KEY)).status_code == 200


async def test_the_environment_says_how_long_keys_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEMPOTENCY_TTL", "5")
    monkeypatch.setenv("IDEMPOTENCY_LEASE", "6")
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware)

    with pytest.raises(ConfigurationError, match="ttl"):
        app.build_middleware_stack()


@pytest.mark.parametrize("kind", ["lifespan", "something.new"])
async def test_what_is_no_connection_reaches_a_plain_application_untouched(kind: str) -> None:
    got: list[Any] = []

    async def inner(*given: Any) -> None:
        got.extend(given)

    wire = Wire()
    scope: Scope = {"type": kind}
    app: ASGIApp = inner
    for ours, options in OURS:
        app = ours(app, **options)

    await app(scope, wire.receive, wire.send)

    assert got == [scope, wire.receive, wire.send]
    assert scope == {"type": kind}


async def test_around_a_plain_application_by_hand_they_work_together() -> None:
    async def hello(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("hello")(scope, receive, send)

    for order in permutations(OURS):
        app: ASGIApp = hello
        for ours, options in order:
            app = ours(app, **options)
        client = connect(app)

        responses = [await client.post("/", headers=KEY) for _ in range(2)]

        assert [response.headers.get_list("x-idempotent-replayed") for response in responses] == [[], ["true"]]
        assert responses[0].headers.get_list("x-ratelimit-remaining") == ["8"]
        assert_ids(responses[1])


async def test_around_an_application_by_hand_a_user_of_its_own_middleware_is_kept_apart_from_the_stack() -> None:
    shop = Shop()
    client = connect(ResilienceMiddleware(shop.app, Pipeline([RateLimitPolicy(MemoryStore(), "1/minute")])))

    assert [(await client.post("/orders")).status_code for _ in range(2)] == [200, 429]
    assert stages(shop.app) == (0, 0)


async def test_what_is_mounted_is_placed_in_its_own_stack_and_leaves_the_outer_alone() -> None:
    async def hello(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    inner = Starlette(routes=[Route("/", hello)])
    inner.add_middleware(RateLimitMiddleware, settings=Settings(rate_limit_requests=2, redis_url=None))
    wrapped = RateLimitMiddleware(
        Starlette(routes=[Route("/", hello)]), settings=Settings(rate_limit_requests=1, redis_url=None)
    )
    outer = Starlette(routes=[Mount("/inner", inner), Mount("/wrapped", wrapped), Route("/free", hello)])
    client = connect(outer)

    statuses = [
        (await client.get(path)).status_code
        for path in ("/wrapped/", "/wrapped/", "/inner/", "/inner/", "/inner/", "/free")
    ]

    assert statuses == [200, 429, 200, 200, 429, 200]
    assert (stages(outer), stages(inner)) == ((0, 0), (1, 1))


async def test_a_mounted_application_whose_stages_are_placed_names_its_own_routes_on_the_first_request() -> None:
    inner = FastAPI()
    inner.add_api_route("/items/{item}", lambda item: item)
    limit = RateLimitPolicy(MemoryStore(), Rule("1/minute", operations=["GET /items/{item}"]))
    inner.add_middleware(ResilienceMiddleware, pipeline=Pipeline([limit]))
    outer = FastAPI()
    outer.mount("/inner", inner)
    outer.add_middleware(RequestContextMiddleware)
    client = connect(outer)

    responses = [await client.get(f"/inner/items/{item}") for item in range(2)]

    assert [response.status_code for response in responses] == [200, 429]
    assert len(responses[1].headers.get_list("retry-after")) == 1
    assert_ids(responses[1])


async def test_a_limit_at_the_edge_of_a_pipeline_that_does_not_lead_is_held() -> None:
    shop = Shop()
    limit = RateLimitPolicy(MemoryStore(), "1/minute")
    shop.app.add_middleware(ResilienceMiddleware, pipeline=Pipeline(edge=[RequestContextPolicy(), limit]))
    install(shop.app, Pipeline())
    client = connect(shop.app)

    responses = [await client.post("/orders") for _ in range(2)]

    assert [response.status_code for response in responses] == [200, 429]
    assert [response.headers["x-ratelimit-remaining"] for response in responses] == ["0", "0"]
    assert_ids(responses[1])


async def test_added_it_does_not_start_with_a_policy_for_a_route_that_is_not_there() -> None:
    app = FastAPI()
    limit = RateLimitPolicy(MemoryStore(), Rule("1/minute", operations=["GET /nowhere"]))
    app.add_middleware(ResilienceMiddleware, pipeline=Pipeline([limit]))

    wire = await Wire([{"type": "lifespan.startup"}]).run(app, {"type": "lifespan", "asgi": {"version": "3.0"}})

    assert [message["type"] for message in wire.sent] == ["lifespan.startup.failed"]
    assert "GET /nowhere" in wire.sent[0]["message"]


async def test_a_route_that_a_lifespan_adds_has_its_name() -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.add_api_route("/late", rate_limit(1)(hello))
        yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(RequestContextMiddleware)

    async with started(app) as client:
        response = await client.get("/late")

    assert "GET /late" in response.headers["ratelimit-policy"]


async def test_a_probe_is_answered_before_everything_else_that_was_added() -> None:
    shop = Shop()
    shop.app.add_middleware(ResilienceMiddleware, health=HealthChecker("1.0.0", "test"))
    shop.app.add_middleware(RateLimitMiddleware, settings=Settings(rate_limit_requests=1, redis_url=None))

    async with started(shop.app) as client:
        statuses = [(await client.get("/health")).status_code for _ in range(3)]

    assert statuses == [200] * 3


async def test_requests_that_were_on_their_way_when_the_stages_moved_are_served_once() -> None:
    shop = Shop()
    arrived, go_on = asyncio.Event(), asyncio.Event()
    shop.app.add_middleware(RateLimitMiddleware, settings=LIMITED)

    @shop.app.middleware("http")
    async def waits(request: Request, call_next: Any) -> Any:
        if "x-slow" in request.headers:
            arrived.set()
            await within(go_on.wait())
        return await call_next(request)

    client = connect(shop.app)
    slow = asyncio.create_task(client.post("/orders", headers={"X-Slow": "1"}))
    await within(arrived.wait())
    quick = await client.post("/orders")
    go_on.set()
    responses = [quick, await within(slow), await client.post("/orders")]

    assert [response.headers.get_list("x-ratelimit-remaining") for response in responses] == [["8"], ["7"], ["6"]]
    for response in responses:
        assert_ids(response)


async def test_an_exception_that_the_application_handles_is_not_touched() -> None:
    shop = Shop()
    shop.app.add_middleware(RequestContextMiddleware)

    @shop.app.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418, "short and stout")

    response = await connect(shop.app).get("/teapot")

    assert (response.status_code, response.json()) == (418, {"detail": "short and stout"})
    assert_ids(response)


def exchange_on_trio(app: ASGIApp, *requests: tuple[str, str, dict[str, str]]) -> list[Any]:
    """Serve requests under trio; return each answer, or the exception that left."""
    pytest.importorskip("trio", reason="an event loop other than asyncio's")

    async def serve() -> list[Any]:
        answers: list[Any] = []
        for method, path, headers in requests:
            sent: list[Any] = []

            async def receive() -> Any:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            try:
                await app(http_scope(method, path, *pairs), receive, send)
            except ConfigurationError as error:
                answers.append(error)
            else:
                answers.append((sent[0]["status"], httpx.Headers(sent[0]["headers"])))
        return answers

    return anyio.run(serve, backend="trio")


def test_limits_and_ids_work_on_trio() -> None:
    shop = Shop()
    of_functions(shop.app)
    shop.app.add_api_route("/sync", rate_limit(3)(lambda: "hello"))
    for ours, options in OURS:
        shop.app.add_middleware(ours, **options)

    answers = exchange_on_trio(shop.app, ("POST", "/orders", {}), ("GET", "/sync", {}))

    assert [(status, headers["x-ratelimit-remaining"]) for status, headers in answers] == [(200, "8"), (200, "2")]
    assert answers[0][1]["x-request-id"].startswith("req_")


def test_a_key_on_trio_is_told_that_it_needs_asyncio() -> None:
    shop = Shop()
    install(shop.app, Pipeline([IdempotencyPolicy(MemoryStore())]))

    (answer,) = exchange_on_trio(shop.app, ("POST", "/orders", KEY))

    assert isinstance(answer, ConfigurationError)
    assert "Idempotency keys" in str(answer)
    assert shop.runs == []
