import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from http_middleware import ResilienceMiddleware, install
from http_middleware.health import HealthApp
from resilience import ComponentHealth, HealthChecker, HealthStatus, Pipeline
from resilience.testing import ManualClock
from tests.integration.http_driver import Wire, connect, http_scope, websocket_scope

QUICK = {"status": "healthy", "version": "1.0.0", "environment": "production"}
PATHS = ["/health", "/health/live", "/health/ready", "/health/startup"]


def checker_of(**options: Any) -> HealthChecker:
    return HealthChecker(version="1.0.0", environment="production", clock=ManualClock(), **options)


def build(checker: HealthChecker | None) -> FastAPI:
    app = FastAPI()
    app.add_api_route("/health", lambda: "the application's own", methods=["GET", "POST"])
    install(app, Pipeline(), health=checker)
    return app


async def connected() -> ComponentHealth:
    return ComponentHealth("database", HealthStatus.HEALTHY, 2.5, "Connected")


@pytest.mark.parametrize("path", ["/health", "/health/live"])
async def test_quick_health_has_exactly_the_documented_shape(path: str) -> None:
    response = await connect(build(checker_of())).get(path)

    assert response.status_code == 200
    assert response.json() == QUICK


@pytest.mark.parametrize("path", ["/health", "/health/live"])
async def test_quick_health_asks_no_check(path: str) -> None:
    checker = checker_of()
    asked: list[str] = []
    checker.add_check("database", lambda: asked.append("database"))

    await connect(build(checker)).get(path)

    assert asked == []


async def test_full_health_reports_each_component_and_is_200_when_all_are_well() -> None:
    checker = checker_of()
    checker.add_check("database", connected)
    checker.add_check("cache", lambda: True)

    response = await connect(build(checker)).get("/health/ready")

    assert response.status_code == 200
    assert response.json() == {
        **QUICK,
        "components": {
            "database": {"status": "healthy", "latency_ms": 2.5, "message": "Connected"},
            "cache": {"status": "healthy", "latency_ms": 0.0},
        },
    }


async def test_full_health_is_503_when_a_critical_component_is_not_well() -> None:
    checker = checker_of()
    checker.add_check("database", connected)
    checker.add_check("cache", lambda: False)

    response = await connect(build(checker)).get("/health/ready")

    assert response.status_code == 503
    assert response.json()["status"] == "unhealthy"
    assert response.json()["components"]["cache"]["status"] == "unhealthy"
    assert response.json()["components"]["database"]["status"] == "healthy"


async def test_full_health_is_200_and_degraded_when_another_component_is_not_well() -> None:
    checker = checker_of()
    checker.add_check("cache", lambda: False, critical=False)

    response = await connect(build(checker)).get("/health/ready")

    assert (response.status_code, response.json()["status"]) == (200, "degraded")


async def test_a_check_that_raises_is_told_by_its_kind_and_not_by_its_text() -> None:
    checker = checker_of()

    def broken() -> None:
        raise ConnectionError("postgres://user:1234@db.internal")

    checker.add_check("database", broken)

    response = await connect(build(checker)).get("/health/ready")

    assert response.status_code == 503
    assert response.json()["components"]["database"]["message"] == "ConnectionError"
    assert "1234" not in response.text


async def test_a_check_that_hangs_is_answered_for() -> None:
    checker = checker_of()
    checker.add_check("database", asyncio.Event().wait, timeout=0)

    response = await connect(build(checker)).get("/health/ready")

    assert response.status_code == 503
    assert response.json()["components"]["database"]["message"] == "Timed out"
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def test_a_draining_service_is_alive_and_not_ready() -> None:
    checker = checker_of()
    client = connect(build(checker))
    assert (await client.get("/health/ready")).status_code == 200

    checker.drain()

    statuses = [(await client.get(path)).status_code for path in PATHS]
    assert statuses == [200, 200, 503, 200]
    assert (await client.get("/health/ready")).json()["status"] == "unhealthy"
    assert (await client.get("/health")).json() == QUICK


async def test_a_starting_service_is_alive_and_neither_ready_nor_started() -> None:
    checker = checker_of(phase="starting")
    client = connect(build(checker))

    before = [(await client.get(path)).status_code for path in PATHS]
    told = (await client.get("/health/startup")).json()
    checker.mark_ready()
    after = [(await client.get(path)).status_code for path in PATHS]

    assert before == [200, 200, 503, 503]
    assert told == {**QUICK, "status": "unhealthy"}
    assert after == [200, 200, 200, 200]


@pytest.mark.parametrize("path", PATHS)
async def test_a_head_probe_has_the_headers_of_a_get_and_no_body(path: str) -> None:
    app = build(checker_of())

    head, get = [await Wire().run(app, http_scope(method, path)) for method in ("HEAD", "GET")]

    assert (head.status, head.headers) == (get.status, get.headers)
    assert head.headers["content-length"] == str(len(get.body))
    assert head.body == b""


@pytest.mark.parametrize("path", PATHS)
async def test_a_probe_is_json_that_nobody_may_cache(path: str) -> None:
    response = await connect(build(checker_of())).get(path)

    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"


async def test_a_probe_never_reaches_the_applications_middleware() -> None:
    app = build(checker_of())
    reached: list[str] = []

    @app.middleware("http")
    async def note(request: Any, call_next: Any) -> Any:
        reached.append(request.url.path)
        return await call_next(request)

    for path in PATHS:
        await connect(app).get(path)

    assert reached == []


async def test_another_method_is_for_the_application() -> None:
    response = await connect(build(checker_of())).post("/health")

    assert response.json() == "the application's own"
    assert "x-request-id" in response.headers


async def test_without_a_checker_the_paths_are_for_the_application() -> None:
    response = await connect(build(None)).get("/health")

    assert response.json() == "the application's own"
    assert "x-request-id" in response.headers


async def test_a_raw_application_can_have_the_probes_as_well() -> None:
    async def hello(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("hello")(scope, receive, send)

    client = connect(ResilienceMiddleware(hello, Pipeline(), health=checker_of()))

    assert (await client.get("/health")).json() == QUICK
    assert (await client.get("/")).text == "hello"


async def test_a_websocket_at_a_probes_path_is_no_probe() -> None:
    async def accepts(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    guarded = ResilienceMiddleware(accepts, Pipeline(), health=checker_of())

    wire = await Wire().run(guarded, websocket_scope("/health"))

    assert [message["type"] for message in wire.sent] == ["websocket.accept"]


async def test_a_probe_is_found_below_the_servers_root_path() -> None:
    client = connect(build(checker_of()), root_path="/api")

    answers = [await client.get(f"/api{path}") for path in PATHS]

    assert [(answer.status_code, answer.json()["version"]) for answer in answers] == [(200, "1.0.0")] * 4


async def test_liveness_asks_the_checks_of_its_group_and_the_quick_path_none() -> None:
    checker = checker_of()
    checker.add_check("event_loop", lambda: False, groups=["live"])
    client = connect(build(checker))

    live, quick, ready = [await client.get(path) for path in ("/health/live", "/health", "/health/ready")]

    assert (live.status_code, live.json()["components"]["event_loop"]["status"]) == (503, "unhealthy")
    assert (quick.status_code, quick.json()) == (200, QUICK)
    assert ready.status_code == 200


async def test_an_unready_service_says_when_to_ask_again() -> None:
    checker = checker_of(phase="starting")
    client = connect(build(checker))

    assert (await client.get("/health/ready")).headers["retry-after"] == "1"
    checker.mark_ready()
    assert "retry-after" not in (await client.get("/health/ready")).headers


async def test_health_json_is_sent_to_those_who_accept_it() -> None:
    checker = checker_of()
    checker.add_check("database", connected)
    checker.add_check("cache", lambda: False, critical=False)
    client = connect(build(checker))

    full, quick = [
        await client.get(path, headers={"accept": "application/health+json, */*"})
        for path in ("/health/ready", "/health")
    ]

    assert full.headers["content-type"] == "application/health+json"
    assert full.json() == {
        "status": "warn",
        "version": "1.0.0",
        "checks": {
            "database": [{"status": "pass", "observedValue": 2.5, "observedUnit": "ms"}],
            "cache": [{"status": "fail", "observedValue": 0.0, "observedUnit": "ms"}],
        },
    }
    assert quick.json() == {"status": "pass", "version": "1.0.0"}


@pytest.mark.parametrize("accept", ["application/json", "application/health+json"])
async def test_details_and_history_are_for_the_bearer_of_the_token(accept: str) -> None:
    secret = "t0ken"
    checker = checker_of(token=secret)

    async def pool() -> ComponentHealth:
        return ComponentHealth("database", HealthStatus.DEGRADED, 1.0, "Busy", {"waiting": {7}})

    checker.add_check("database", pool)
    client = connect(build(checker))
    tokens = [None, "Bearer t0ke", "Basic t0ken", "Bearer t0ken"]

    answers = [
        await client.get("/health/ready", headers={"accept": accept} | ({"authorization": token} if token else {}))
        for token in tokens
    ]

    assert ["waiting" in answer.text for answer in answers] == [False, False, False, True]
    assert ["history" in answer.json() for answer in answers] == [False, False, False, accept == "application/json"]


async def test_a_port_of_its_own_answers_probes_and_nothing_else() -> None:
    client = connect(HealthApp(checker_of()))

    assert (await client.get("/health/ready")).status_code == 200
    assert [(await client.get("/")).status_code, (await client.post("/health")).status_code] == [404, 404]
    assert (await Wire().run(HealthApp(checker_of()), websocket_scope("/health"))).sent == []
