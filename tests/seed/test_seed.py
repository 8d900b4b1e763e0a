"""The user's document, heading by heading: each test sets up what its snippet takes for granted, and runs it."""

import asyncio
import contextvars
import json
import re
import shlex
import sqlite3
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import structlog
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from redis.asyncio import Redis

import http_middleware
import resilience
from http_middleware import install
from resilience import (
    HealthChecker,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    get_correlation_id,
    get_request_context,
)
from resilience.testing import ManualClock
from tests.integration.http_driver import connect, dial, serving
from tests.seed.document import HEADINGS, blocks, run
from tests.support.redis_servers import RedisServer, binary

KEY = {"Idempotency-Key": "pay_abc123"}


class PaymentCreate(BaseModel):
    amount: int


class Payment(BaseModel):
    id: str
    amount: int


@pytest.fixture
def router() -> APIRouter:
    return APIRouter()


@pytest.fixture
async def redis_url() -> AsyncIterator[str]:
    async with RedisServer(binary()) as server:
        yield server.url


@pytest.fixture
def structlog_() -> Iterator[Any]:
    yield structlog.get_logger()
    structlog.reset_defaults()


def served(router: APIRouter, *core: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    install(app, Pipeline(core))
    return app


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get_list("x-idempotent-replayed") == ["true"]


def test_every_heading_has_a_test() -> None:
    named = re.sub(r"[^a-z]+", "_", " ".join(name for name in globals() if name.startswith("test_")))

    assert len(HEADINGS) == 18
    assert [heading for heading in HEADINGS if re.sub(r"[^a-z]+", "_", heading.lower()) not in named] == []


@pytest.mark.parametrize("package", [http_middleware, resilience])
def test_no_module_takes_the_place_of_what_is_imported_by_name(package: ModuleType) -> None:
    for module in iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)

    assert [name for name in package.__all__ if isinstance(getattr(package, name), ModuleType)] == []


async def test_global_rate_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str) -> None:
    (tmp_path / ".env").write_text(*blocks("Global Rate Limit", "env"))
    monkeypatch.chdir(tmp_path)
    app = FastAPI()
    app.add_api_route("/", lambda: "hello")
    async with Redis.from_url(redis_url) as redis:
        run("Global Rate Limit", app=app, redis=redis)

        async with serving(app) as port, dial(port) as client:
            responses = await asyncio.gather(*(client.get("/") for _ in range(101)))

        assert sorted(response.status_code for response in responses) == [200] * 100 + [429]
        assert await redis.dbsize() == 1


async def test_per_endpoint_rate_limit(router: APIRouter) -> None:
    run("Per-Endpoint Rate Limit", router=router)
    client = connect(served(router))

    responses = [await client.post("/expensive-operation") for _ in range(6)]

    assert [response.status_code for response in responses] == [200] * 5 + [429]
    assert responses[5].json()["detail"] == "Too many requests"


async def test_response_headers(router: APIRouter) -> None:
    router.add_api_route("/", lambda: "hello")
    client = connect(served(router, RateLimitPolicy(MemoryStore(clock=ManualClock()), "100/60s")))
    (told,) = (dict(line.split(": ") for line in block.splitlines()) for block in blocks("Response Headers", ""))
    (refused,) = map(json.loads, blocks("Response Headers", "json"))

    responses = [await client.get("/") for _ in range(101)]

    fifth = {name: responses[4].headers[name] for name in told}
    assert fifth == {**told, "X-RateLimit-Reset": fifth["X-RateLimit-Reset"]}
    assert all(0 < int(response.headers["X-RateLimit-Reset"]) <= 62 for response in responses)
    assert {response.status_code for response in responses[:100]} == {200}
    denied = responses[100]
    assert denied.status_code == 429
    assert denied.json() == {**refused, "retry_after": int(denied.headers["retry-after"])}
    assert denied.headers["X-RateLimit-Remaining"] == "0"


def curl(script: str) -> Iterator[tuple[str, str, dict[str, str], str]]:
    """Yield the method, the path, the headers and the data of each curl in a shell script."""
    for command in script.replace("\\\n", "").splitlines():
        if not command.startswith("curl "):
            continue
        words = iter(shlex.split(command)[1:])
        sent: dict[str, list[str]] = {"-X": [], "-H": [], "-d": [], "": []}
        for word in words:
            sent[word if word in sent else ""].append(next(words) if word in sent else word)
        (method,), (path,), (data,) = sent["-X"], sent[""], sent["-d"]
        yield method, path, dict(header.split(": ") for header in sent["-H"]), data


async def test_client_usage(router: APIRouter) -> None:
    paid: list[Any] = []

    @router.post("/api/payments")
    async def create_payment(request: Request) -> dict[str, Any]:
        paid.append(await request.json())
        return {"id": len(paid)}

    client = connect(served(router, IdempotencyPolicy(MemoryStore())))
    (script,) = blocks("Client Usage", "bash")

    first, retry = [
        await client.request(method, path, headers=headers, content=data)
        for method, path, headers, data in curl(script)
    ]

    assert paid == [{"amount": 100}]
    assert retry.content == first.content == b'{"id":1}'
    assert not is_replay(first)
    assert is_replay(retry)


@pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")  # it is what the user's handler calls
async def test_dependency_pattern(router: APIRouter) -> None:
    paid: list[int] = []

    async def process_payment(data: PaymentCreate) -> Payment:
        paid.append(data.amount)
        if len(paid) == 1:
            raise RuntimeError("declined")
        return Payment(id=f"pay_{len(paid)}", amount=data.amount)

    run(
        "Dependency Pattern",
        router=router,
        PaymentCreate=PaymentCreate,
        Depends=Depends,
        process_payment=process_payment,
    )
    client = connect(served(router), headers=KEY)

    failed, first, retry = [await client.post("/payments", json={"amount": 100}) for _ in range(3)]

    assert failed.status_code == 500
    assert first.json() == {"id": "pay_2", "amount": 100}
    assert (retry.status_code, retry.content) == (first.status_code, first.content)
    assert is_replay(retry)
    assert paid == [100, 100]


async def test_decorator_pattern(router: APIRouter) -> None:
    paid: list[int] = []

    async def process_payment(data: PaymentCreate) -> Payment:
        paid.append(data.amount)
        return Payment(id="pay_1", amount=data.amount)

    run(
        "Decorator Pattern",
        router=router,
        Request=Request,
        PaymentCreate=PaymentCreate,
        process_payment=process_payment,
    )
    client = connect(served(router))

    without = await client.post("/payments", json={"amount": 100})
    first, retry = [await client.post("/payments", json={"amount": 100}, headers=KEY) for _ in range(2)]

    assert without.status_code == 400
    assert first.json() == {"id": "pay_1", "amount": 100}
    assert retry.content == first.content
    assert is_replay(retry)
    assert paid == [100]


async def test_require_idempotency_key(router: APIRouter) -> None:
    run("Require Idempotency Key", router=router, Depends=Depends)
    client = connect(served(router))

    missing = await client.post("/payments")

    assert (missing.status_code, list(missing.json())) == (400, ["detail"])
    assert missing.headers["x-request-id"].startswith("req_")
    assert (await client.post("/payments", headers=KEY)).status_code == 200


def test_generate_deterministic_keys() -> None:
    def key(user_id: Any = 7, amount: Any = Decimal("10.00"), currency: str = "EUR") -> str:
        made: str = run("Generate Deterministic Keys", user_id=user_id, amount=amount, currency=currency)["key"]
        return made

    assert re.fullmatch(r"[0-9a-f]{64}", key())
    assert key() == key()
    assert len({key(), key(user_id="7"), key(amount=Decimal("10.01")), key(currency="USD")}) == 4


async def test_setup_middleware() -> None:
    app = FastAPI()
    app.add_api_route("/", get_correlation_id)
    run("Setup Middleware", app=app)

    response = await connect(app).get("/", headers={"X-Correlation-ID": "abc123"})

    assert response.json() == response.headers["x-correlation-id"] == "abc123"
    assert response.headers["x-request-id"].startswith("req_")


async def test_automatic_propagation() -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: None)
    run("Setup Middleware", app=app)
    incoming, answered = (dict(re.findall(r"(\S+): (\S+)", block)) for block in blocks("Automatic Propagation", ""))
    client = connect(app)

    response, without = await client.get("/", headers=incoming), await client.get("/")

    assert response.headers["X-Correlation-ID"] == answered["X-Correlation-ID"] == incoming["X-Correlation-ID"]
    for name, shown in answered.items():
        assert response.headers.get_list(name)[0].startswith(shown[:4])
        assert len(without.headers.get_list(name)) == 1
    assert without.headers["X-Correlation-ID"] != "abc123"


async def test_access_context_anywhere(router: APIRouter) -> None:
    known = run("Access Context Anywhere", router=router, logger=structlog.get_logger())
    client = connect(served(router), headers={"X-Correlation-ID": "abc123"})

    @router.get("/context")
    async def context() -> list[str | None]:
        full = known["get_request_context"]()
        assert full.request_id == known["get_request_id"]()
        return [full.correlation_id, full.user_id]

    client = connect(served(router), headers={"X-Correlation-ID": "abc123"})
    with structlog.testing.capture_logs() as logged:
        assert (await client.get("/orders/o_1")).status_code == 200

    assert logged == [{"event": "Fetching order", "order_id": "o_1", "correlation_id": "abc123", "log_level": "info"}]
    assert (await client.get("/context")).json() == ["abc123", None]


async def test_set_user_context(router: APIRouter) -> None:
    async def authenticate(request: Request) -> SimpleNamespace:
        user, tenant = request.headers["authorization"].split("@")
        return SimpleNamespace(id=int(user), tenant_id=tenant)

    @router.get("/me")
    async def me() -> list[str | None]:
        context = get_request_context()
        return [context.user_id, context.tenant_id]

    app = served(router)
    app.middleware("http")(run("Set User Context", authenticate=authenticate)["auth_middleware"])

    assert (await connect(app).get("/me", headers={"Authorization": "7@acme"})).json() == ["7", "acme"]


async def test_propagate_to_downstream(router: APIRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    call_other_service = run("Propagate to Downstream")["call_other_service"]
    orders = APIRouter()
    seen: list[Any] = []

    @router.get("/")
    async def first() -> str | None:
        await call_other_service()
        return get_request_context().request_id

    @orders.get("/api/orders")
    async def second() -> None:
        context = get_request_context()
        seen.append((context.correlation_id, context.parent_request_id))

    async with serving(served(orders)) as port:
        # Stands where the name order-service leads.
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "")
        response = await connect(served(router)).get("/", headers={"X-Correlation-ID": "abc123"})

    assert seen == [("abc123", response.json())]


async def test_structlog_integration(router: APIRouter, structlog_: Any, capsys: pytest.CaptureFixture[str]) -> None:
    @router.get("/")
    async def process() -> None:
        run("Structlog Integration", logger=structlog_)

    await connect(served(router)).get("/", headers={"X-Correlation-ID": "abc123"})

    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["correlation_id"]) == ("Processing order", "abc123")
    assert line["request_id"].startswith("req_")


async def test_background_tasks(router: APIRouter) -> None:
    known: dict[str, Any] = {}

    @router.post("/")
    async def spawn() -> None:
        known.update(run("Background Tasks", get_correlation_id=get_correlation_id))

    async def job() -> str | None:
        assert get_correlation_id() is None
        await known["background_job"]()
        return get_correlation_id()

    await connect(served(router)).post("/", headers={"X-Correlation-ID": "abc123"})

    assert await asyncio.create_task(job(), context=contextvars.Context()) == "abc123"


async def test_quick_health(router: APIRouter) -> None:
    run("Quick Health", router=router)
    (shown,) = blocks("Quick Health", "json")

    response = await connect(served(router)).get("/health")

    assert (response.status_code, response.json()) == (200, json.loads(shown))


async def test_full_health(router: APIRouter, redis_url: str) -> None:
    db = sqlite3.connect(":memory:", check_same_thread=False)
    run("Full Health", router=router, db=db, redis_url=redis_url, JSONResponse=JSONResponse)
    (shown,) = map(json.loads, blocks("Full Health", "json"))

    response = await connect(served(router)).get("/health/ready")

    told = response.json()
    for name, component in told["components"].items():
        shown["components"][name]["latency_ms"] = component["latency_ms"]
        assert component["latency_ms"] >= 0
    assert (response.status_code, told) == (200, shown)

    db.close()
    run("Full Health", router=(later := APIRouter()), db=db, redis_url=redis_url, JSONResponse=JSONResponse)
    response = await connect(served(later)).get("/health/ready")
    assert (response.status_code, response.json()["status"]) == (503, "unhealthy")


async def test_custom_health_checks() -> None:
    api = FastAPI()
    api.add_api_route("/health", lambda: "fine")
    for transport, status in (
        (httpx.ASGITransport(api), "healthy"),
        (httpx.MockTransport(lambda _: _unreachable()), "unhealthy"),
    ):
        checker = HealthChecker()
        async with httpx.AsyncClient(transport=transport) as client:
            run("Custom Health Checks", checker=checker, client=client)
            report = (await checker.run()).to_dict()

        assert report["status"] == report["components"]["external_api"]["status"] == status


def _unreachable() -> httpx.Response:
    raise httpx.ConnectError("All connection attempts failed")
