"""What an application's OpenAPI page says of the pipeline in front of it, and that it is what callers meet."""

from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from typing import Annotated, Any

import pytest
import schemathesis
from fastapi import APIRouter, Depends, FastAPI, Header
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from schemathesis.specs.openapi import checks

from http_middleware import IdempotencyMiddleware, RateLimitMiddleware, install
from http_middleware.decorators import idempotent, rate_limit
from http_middleware.guard import IdempotencyGuard, get_idempotency_guard, require_idempotency_key
from http_middleware.openapi import document
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Policy, RateLimitPolicy, Rule, Selective, wire
from resilience.policies.rule import OnOutage
from resilience.testing import FaultyStore
from resilience.wire import TABLE, Reason
from tests.integration.http_driver import connect

STORE = MemoryStore()
KEYED = {"400", "409", "413", "422", "503"}
LIMITS = {"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "RateLimit", "RateLimit-Policy"}
IDS = {"X-Request-ID", "X-Correlation-ID"}
OUTAGES: tuple[OnOutage, OnOutage] = ("local", "closed")
PROBLEM = "application/problem+json"
# What is sent to be refused, amounts with keys, the last of them being refused; and whether the store is gone.
REFUSED: dict[Reason, tuple[list[tuple[int, str | None]], bool]] = {
    Reason.RATE_LIMITED: ([(1, "a"), (1, "b"), (1, "c"), (1, "d")], False),
    Reason.IDEMPOTENCY_KEY_MISSING: ([(1, None)], False),
    Reason.IDEMPOTENCY_KEY_MALFORMED: ([(1, "two words")], False),
    Reason.IDEMPOTENCY_PAYLOAD_MISMATCH: ([(1, "a"), (2, "a")], False),
    Reason.IDEMPOTENCY_NOT_REPLAYABLE: ([(1000, "a"), (1000, "a")], False),
    Reason.PAYLOAD_TOO_LARGE: ([(10**60, "a")], False),
    Reason.STORE_UNAVAILABLE: ([(1, "a")], True),
}


class Order(BaseModel):
    amount: int


def build() -> FastAPI:
    app = FastAPI()

    @app.get("/orders")
    async def list_orders() -> list[int]:
        return []

    @app.post("/orders")
    async def create_order(order: Order) -> Order:
        return order

    @app.delete("/orders")
    async def delete_orders() -> None: ...

    return app


def page_of(app: FastAPI, *core: Policy, **options: Any) -> dict[str, Any]:
    document(app, Pipeline(core, **options))
    page = app.openapi()
    assert_valid(page)
    return page


def assert_valid(page: dict[str, Any]) -> None:
    schemathesis.openapi.from_dict(deepcopy(page)).validate()
    for reference in references(page):
        resolve(page, {"$ref": reference})


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def resolve(page: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    found: Any = page
    for part in value["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    assert isinstance(found, dict)
    return found


def refusals(page: dict[str, Any], operation: str) -> set[str]:
    method, _, path = operation.partition(" ")
    return set(page["paths"][path][method.lower()]["responses"]) - {"200", "201"}


def reply_of(page: dict[str, Any], operation: str, status: str) -> dict[str, Any]:
    method, _, path = operation.partition(" ")
    return resolve(page, page["paths"][path][method.lower()]["responses"][status])


def key_of(page: dict[str, Any], operation: str) -> dict[str, Any] | None:
    method, _, path = operation.partition(" ")
    parameters = page["paths"][path][method.lower()].get("parameters", [])
    keys = [one for one in (resolve(page, each) for each in parameters) if one["name"].lower() == wire.IDEMPOTENCY_KEY]
    assert len(keys) < 2
    return keys[0] if keys else None


@pytest.mark.parametrize("version", ["3.0.3", "3.1.0"])
def test_a_page_with_everything_on_it_is_valid(version: str) -> None:
    app = build()
    app.openapi_version = version
    refusing = IdempotencyPolicy(STORE, required=True, takeover="refuse")
    page = page_of(app, RateLimitPolicy(STORE, Rule("9/minute", on_outage="closed")), refusing)
    assert refusals(page, "POST /orders") == {"429", *KEYED}


def test_a_page_without_a_policy_stays_as_it_is() -> None:
    assert page_of(build(), edge=()) == build().openapi()


def test_every_reply_carries_the_ids() -> None:
    page = page_of(build())
    assert refusals(page, "GET /orders") == set()
    assert set(reply_of(page, "GET /orders", "200")["headers"]) == IDS
    assert set(reply_of(page, "POST /orders", "422")["headers"]) == IDS


def test_a_limit_for_all_is_told_at_each_operation_and_in_each_reply() -> None:
    page = page_of(build(), RateLimitPolicy(STORE, "9/minute"))
    for operation in ("GET /orders", "POST /orders", "DELETE /orders"):
        assert "429" in refusals(page, operation)
        assert set(reply_of(page, operation, "200")["headers"]) == IDS | LIMITS
        assert set(reply_of(page, operation, "429")["headers"]) == IDS | LIMITS | {"Retry-After"}


@pytest.mark.parametrize("policy", [RateLimitPolicy(STORE, "9/minute"), IdempotencyPolicy(STORE)])
def test_a_policy_for_one_operation_is_told_there_alone(policy: Policy) -> None:
    page = page_of(build(), Selective(Selective(policy, ["POST /orders"]), ["POST /orders", "GET /orders"]))
    assert refusals(page, "POST /orders") > {"422"}
    assert refusals(page, "GET /orders") == refusals(page, "DELETE /orders") == set()


def test_a_rule_for_one_operation_is_told_there_alone() -> None:
    edge = [RateLimitPolicy(STORE, Rule("9/minute", operations=["DELETE /orders"]))]
    page = page_of(build(), edge=edge)
    assert refusals(page, "DELETE /orders") == {"429"}
    assert refusals(page, "GET /orders") == set()
    assert set(reply_of(page, "DELETE /orders", "200")["headers"]) == LIMITS


def test_a_rule_in_shadow_is_not_told() -> None:
    assert refusals(page_of(build(), RateLimitPolicy(STORE, Rule("9/minute", shadow=True))), "GET /orders") == set()


def test_a_key_is_told_where_it_counts() -> None:
    page = page_of(build(), IdempotencyPolicy(STORE))
    key = key_of(page, "POST /orders")
    assert key is not None
    assert key["description"]
    assert (key["in"], key["required"]) == ("header", False)
    assert (key["schema"]["minLength"], key["schema"]["maxLength"]) == (1, 255)
    assert refusals(page, "POST /orders") == refusals(page, "DELETE /orders") == KEYED
    assert "X-Idempotent-Replayed" in reply_of(page, "POST /orders", "200")["headers"]
    assert "Retry-After" in reply_of(page, "POST /orders", "409")["headers"]
    assert key_of(page, "GET /orders") is None
    assert refusals(page, "GET /orders") == set()


def test_a_key_that_must_come_is_told_to_be_required() -> None:
    page = page_of(build(), IdempotencyPolicy(STORE, required=True))
    key = key_of(page, "POST /orders")
    assert key is not None
    assert key["required"] is True
    assert "idempotency_key_missing" in reply_of(page, "POST /orders", "400")["description"]


def test_an_outage_is_told_only_where_it_refuses() -> None:
    local, refusing = (RateLimitPolicy(STORE, Rule("9/minute", on_outage=way)) for way in OUTAGES)
    page = page_of(build(), local, IdempotencyPolicy(STORE, on_outage="open"))
    assert "503" not in refusals(page, "POST /orders")
    assert "503" in refusals(page_of(build(), refusing), "GET /orders")


def test_decorators_are_told() -> None:
    app = FastAPI()
    app.openapi_version = "3.2.0"  # the first that knows what FastAPI says of streams

    @app.post("/payments")
    @rate_limit(5)
    @idempotent(require_key=True)
    async def pay() -> None: ...

    @app.get("/stream")
    @rate_limit("5/minute", on_outage="closed")
    async def stream() -> AsyncIterator[int]:
        yield 1

    page = page_of(app)
    assert refusals(page, "POST /payments") == {"429", *KEYED}
    key = key_of(page, "POST /payments")
    assert key is not None
    assert key["required"]
    assert refusals(page, "GET /stream") == {"429", "503"}


def test_dependencies_are_told_however_deep() -> None:
    @rate_limit(5)
    async def limited() -> None: ...

    async def deep(guard: Annotated[IdempotencyGuard, Depends(get_idempotency_guard)]) -> IdempotencyGuard:
        return guard

    router = APIRouter()

    @router.post("/guarded", dependencies=[Depends(limited)])
    async def guarded(guard: Annotated[IdempotencyGuard, Depends(deep)]) -> None: ...

    app = FastAPI()
    app.include_router(router)
    app.include_router(router, prefix="/required", dependencies=[Depends(require_idempotency_key)])

    @app.post("/required")
    async def required(key: Annotated[str, Depends(require_idempotency_key)]) -> None: ...

    page = page_of(app)
    assert refusals(page, "POST /guarded") == refusals(page, "POST /required/guarded") == {"429", *KEYED}
    assert refusals(page, "POST /required") == {"400"}
    told = [key_of(page, operation) for operation in ("POST /guarded", "POST /required/guarded", "POST /required")]
    assert [key and key["required"] for key in told] == [False, True, True]


def test_each_prefix_of_a_router_is_an_operation_of_its_own() -> None:
    router = APIRouter()

    @router.post("/{order}/items/{rest:path}")
    async def add(order: int, rest: str) -> None: ...

    app = FastAPI()
    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2")
    page = page_of(app, Selective(IdempotencyPolicy(STORE), ["POST /v2/{order}/items/{rest}"]))
    assert refusals(page, "POST /v1/{order}/items/{rest}") == {"422"}
    assert refusals(page, "POST /v2/{order}/items/{rest}") == KEYED


def test_what_the_application_declares_stays() -> None:
    class Refusal(BaseModel):
        ours: bool

    app = FastAPI()
    declared: dict[int | str, dict[str, Any]] = {
        409: {"description": "Taken", "headers": {"retry-after": {"schema": {"type": "string"}}}},
        422: {"description": "Not valid"},
        429: {"model": Refusal},
    }

    @app.post("/orders", responses=declared)
    async def create(idempotency_key: Annotated[str, Header(description="Mine")]) -> Refusal:
        return Refusal(ours=bool(idempotency_key))

    before = deepcopy(app.openapi())
    page = page_of(app, RateLimitPolicy(STORE, "9/minute"), IdempotencyPolicy(STORE))
    for status, told in before["paths"]["/orders"]["post"]["responses"].items():
        after = reply_of(page, "POST /orders", status)
        assert {**after, "headers": None} == {**told, "headers": None}
        assert set(after["headers"]) >= IDS | LIMITS
    assert reply_of(page, "POST /orders", "409")["headers"]["retry-after"] == {"schema": {"type": "string"}}
    assert "Retry-After" not in reply_of(page, "POST /orders", "409")["headers"]
    assert "Retry-After" in reply_of(page, "POST /orders", "429")["headers"]
    assert page["components"]["schemas"]["Refusal"] == before["components"]["schemas"]["Refusal"]
    key = key_of(page, "POST /orders")
    assert key is not None
    assert key["description"] == "Mine"


def test_a_422_for_what_is_not_valid_is_told_beside_ours() -> None:
    page = page_of(build(), IdempotencyPolicy(STORE))
    validation = {"$ref": "#/components/schemas/HTTPValidationError"}
    content = reply_of(page, "POST /orders", "422")["content"]
    assert validation in content["application/json"]["schema"]["anyOf"]
    assert set(content) == {"application/json", PROBLEM}
    assert list(references(reply_of(page, "DELETE /orders", "422")["content"])).count(validation["$ref"]) == 0


@pytest.mark.parametrize("range_", ["4XX", "default"])
def test_a_range_that_the_application_declares_stands_for_its_422(range_: str) -> None:
    app = FastAPI()
    app.add_api_route("/orders", Order, methods=["POST"], responses={range_: {"description": "No"}})
    assert "422" not in refusals(page_of(app, IdempotencyPolicy(STORE)), "POST /orders")


def test_hidden_routes_and_webhooks_are_left_alone() -> None:
    app = build()
    app.add_api_route("/hidden", lambda: None, methods=["POST"], include_in_schema=False)
    app.webhooks.add_api_route("orders", lambda: None, methods=["POST"])
    before = deepcopy(app.openapi())
    page = page_of(app, RateLimitPolicy(STORE, "9/minute"), IdempotencyPolicy(STORE))
    assert set(page["paths"]) == {"/orders"}
    assert page["webhooks"] == before["webhooks"]


def test_a_page_of_the_applications_own_is_completed_too() -> None:
    app = build()
    pipeline = Pipeline([RateLimitPolicy(STORE, "9/minute")])

    def titled() -> dict[str, Any]:
        return get_openapi(title="Mine", version="1", routes=app.routes)

    app.openapi = titled  # type: ignore[method-assign]
    document(app, pipeline)
    first = app.openapi()
    assert first["info"]["title"] == "Mine"
    assert "429" in refusals(first, "GET /orders")
    assert app.openapi() == first

    documented = app.openapi
    app.openapi = lambda: {**documented(), "info": {"title": "Later", "version": "2"}}  # type: ignore[method-assign]
    document(app, pipeline)
    assert app.openapi() == {**first, "info": {"title": "Later", "version": "2"}}


def test_a_page_is_completed_once_and_told_twice_says_nothing_twice() -> None:
    app = build()
    pipeline = Pipeline([RateLimitPolicy(STORE, "9/minute"), IdempotencyPolicy(STORE)])
    document(app, pipeline)
    documented = app.openapi
    page = deepcopy(app.openapi())
    document(app, pipeline)
    assert app.openapi is documented
    assert app.openapi() is app.openapi_schema
    assert app.openapi() == page
    document(app, Pipeline([RateLimitPolicy(STORE, "9/minute"), IdempotencyPolicy(STORE)]))
    assert app.openapi() == page


def test_a_route_that_comes_later_is_told() -> None:
    app = build()
    page_of(app, RateLimitPolicy(STORE, "9/minute"))
    app.add_api_route("/later", lambda: None)
    app.openapi_schema = None
    assert "429" in refusals(app.openapi(), "GET /later")


def test_every_header_that_leaves_has_its_name_on_the_page() -> None:
    page = page_of(build(), RateLimitPolicy(STORE, "9/minute"), IdempotencyPolicy(STORE))
    assert {name.lower() for name in page["components"]["headers"]} == wire.OURS - {wire.RETRY_PUSHBACK}


CONFORMANCE = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.mark.parametrize("accept", ["application/json", PROBLEM])
@pytest.mark.parametrize("reason", list(REFUSED), ids=lambda reason: reason.value)
def test_each_refusal_is_what_the_page_says(reason: Reason, accept: str) -> None:
    store = FaultyStore(MemoryStore())
    app = build()
    keyed = IdempotencyPolicy(store, required=True, max_payload=50, max_reply=14)
    pipeline = Pipeline([RateLimitPolicy(store, Rule("3/minute", on_outage="closed")), keyed])
    install(app, pipeline)
    document(app, pipeline)
    operation = schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config())["/orders"]["POST"]

    def send(amount: int, key: str | None) -> Any:
        headers = {"Accept": accept} | ({} if key is None else {"idempotency-key": key})
        case = operation.Case(body={"amount": amount})
        reply = case.call(headers=headers)
        case.validate_response(reply, checks=CONFORMANCE)
        return reply

    requests, down = REFUSED[reason]
    store.down = down
    reply = [send(amount, key) for amount, key in requests][-1]
    assert reply.status_code == TABLE[reason].http
    assert reply.headers["content-type"] == [accept]
    assert reply.json().get("code", reason.value) == reason.value


async def test_the_page_tells_of_the_middleware_that_was_added_and_of_nothing_twice() -> None:
    app = FastAPI()
    app.add_api_route("/orders", lambda: None, methods=["POST"])
    app.add_middleware(IdempotencyMiddleware)
    app.add_middleware(RateLimitMiddleware)
    async with connect(app) as client:
        pages = [(await client.get("/openapi.json")).json() for _ in range(2)]
    told = pages[0]["paths"]["/orders"]["post"]
    assert set(told["responses"]) >= {"200", "400", "409", "422", "429", "503"}
    assert [parameter["$ref"] for parameter in told["parameters"]] == ["#/components/parameters/IdempotencyKey"]
    assert pages[0] == pages[1]
