from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from http_middleware import install
from resilience import (
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    RateLimitPolicy,
    Selective,
    set_context_user,
)
from resilience.testing import FaultyStore, ManualClock
from tests.integration.http_driver import Wire, connect, http_scope, upload

PROBLEM = {"Accept": "application/problem+json"}
KEY = {"Idempotency-Key": "key_1"}


class Order(BaseModel):
    item: str
    count: int = 1


class Shop:
    """An application that notes every run of its handlers."""

    def __init__(self, *core: Policy, **options: Any) -> None:
        self.ran: list[Any] = []
        self.clock = ManualClock()
        self.store = FaultyStore(MemoryStore(clock=self.clock))
        self.app = app = FastAPI()

        @app.post("/orders", status_code=201)
        async def create(order: Order) -> dict[str, Any]:
            self.ran.append(order.item)
            return {"id": len(self.ran), "item": order.item}

        @app.api_route("/orders/{order}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
        async def change(order: str, note: str = "") -> dict[str, Any]:
            self.ran.append((order, note))
            return {"run": len(self.ran)}

        @app.post("/documents")
        async def document() -> Response:
            self.ran.append("document")
            response = Response(
                b'{"id":  1,\n "price": 1.50, "\xff": null}',
                201,
                {
                    "Location": "/documents/1",
                    "X-App": "kept",
                    "Content-Type": "application/x-odd",
                    "Date": "Mon, 01 Jan 2001 00:00:00 GMT",
                    "Server": "own",
                },
            )
            response.headers.append("Link", "</documents/1>; rel=self")
            response.headers.append("Link", "</documents>; rel=up")
            response.set_cookie("session", "secret")
            return response

        @app.post("/status/{status}")
        async def answer(status: int) -> Response:
            self.ran.append(status)
            return Response(b"" if status in (204, 304) else str(len(self.ran)).encode(), status)

        @app.post("/refused/{status}")
        async def refuse(status: int) -> None:
            self.ran.append(status)
            raise HTTPException(status, f"run {len(self.ran)}")

        @app.post("/broken")
        async def broken() -> None:
            self.ran.append("broken")
            if len(self.ran) == 1:
                raise RuntimeError("broken")

        install(app, Pipeline([*core, IdempotencyPolicy(self.store, **options)]))


async def twice(app: FastAPI, path: str = "/orders", **options: Any) -> tuple[httpx.Response, httpx.Response]:
    client = connect(app, headers=KEY)
    return await client.post(path, **options), await client.post(path, **options)


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get_list("x-idempotent-replayed") == ["true"]


async def test_a_retry_gets_the_first_reply_byte_for_byte_and_is_told_so() -> None:
    shop = Shop()

    first, retry = await twice(shop.app, "/documents")

    assert (retry.status_code, retry.content) == (first.status_code, first.content) == (201, first.content)
    assert first.content == b'{"id":  1,\n "price": 1.50, "\xff": null}'
    assert not is_replay(first)
    assert is_replay(retry)
    assert shop.ran == ["document"]


async def test_a_replay_keeps_the_applications_headers_in_number_and_order() -> None:
    first, retry = await twice(Shop().app, "/documents")

    new = {"date", "server", "set-cookie", "x-request-id", "x-correlation-id", "x-idempotent-replayed"}
    sent, kept = (
        [pair for pair in response.headers.multi_items() if pair[0] not in new] for response in (first, retry)
    )
    assert kept == sent
    assert retry.headers["location"] == "/documents/1"
    assert retry.headers.get_list("link") == ["</documents/1>; rel=self", "</documents>; rel=up"]


async def test_a_cookie_and_a_date_are_not_shown_again() -> None:
    first, retry = await twice(Shop().app, "/documents")

    assert {"set-cookie", "date", "server"} <= set(first.headers)
    assert not {"set-cookie", "date", "server"} & set(retry.headers)


async def test_a_replay_has_ids_and_limits_of_its_own() -> None:
    shop = Shop(RateLimitPolicy(MemoryStore(clock=ManualClock()), "9/minute"))

    first, retry = await twice(shop.app, "/documents")

    assert is_replay(retry)
    assert len(retry.headers.get_list("x-request-id")) == 1
    assert retry.headers["x-request-id"] != first.headers["x-request-id"]
    assert retry.headers.get_list("x-ratelimit-remaining") == ["7"]


async def test_a_replay_carries_the_correlation_id_of_its_own_request() -> None:
    client = connect(Shop().app, headers=KEY)

    for name in ("first", "second"):
        response = await client.post("/documents", headers={"X-Correlation-ID": name})
        assert response.headers.get_list("x-correlation-id") == [name]


async def test_a_third_and_a_fourth_retry_get_it_as_well() -> None:
    shop = Shop()
    client = connect(shop.app, headers=KEY)

    contents = {(await client.post("/documents")).content for _ in range(4)}

    assert len(contents) == 1
    assert len(shop.ran) == 1


async def test_after_the_ttl_the_key_is_free() -> None:
    shop = Shop(ttl=60)
    client = connect(shop.app, headers=KEY)
    await client.post("/documents")

    shop.clock.advance(59.9)
    assert is_replay(await client.post("/documents"))
    shop.clock.advance(0.2)
    assert not is_replay(await client.post("/documents"))


async def test_json_members_in_another_order_are_the_same_request() -> None:
    shop = Shop()
    client = connect(shop.app, headers={**KEY, "Content-Type": "application/json"})

    await client.post("/orders", content=b'{"item": "tea", "count": 2}')
    retry = await client.post("/orders", content=b'{"count":2,\n"item":"tea"}')

    assert is_replay(retry)
    assert shop.ran == ["tea"]


@pytest.mark.parametrize(
    "other", [{"item": "tea", "count": 3}, {"item": "tea"}, {"item": "tea", "count": 2, "gift": None}]
)
async def test_json_of_another_value_is_another_request(other: dict[str, Any]) -> None:
    shop = Shop()
    client = connect(shop.app, headers={**KEY, **PROBLEM})
    await client.post("/orders", json={"item": "tea", "count": 2})

    response = await client.post("/orders", json=other)

    assert (response.status_code, response.json()["code"]) == (422, "idempotency_payload_mismatch")
    assert shop.ran == ["tea"]


async def test_a_refusal_has_the_plain_body_and_carries_ids() -> None:
    client = connect(Shop().app, headers=KEY)
    await client.post("/orders", json={"item": "tea"})

    response = await client.post("/orders", json={"item": "milk"})

    assert response.json() == {"detail": "This Idempotency-Key was used with another request"}
    assert response.headers["x-request-id"].startswith("req_")
    assert "retry-after" not in response.headers


async def test_a_request_that_does_not_match_leaves_the_first_reply_in_place() -> None:
    client = connect(Shop().app, headers=KEY)
    first = await client.post("/orders", json={"item": "tea"})
    await client.post("/orders", json={"item": "milk"})

    retry = await client.post("/orders", json={"item": "tea"})

    assert is_replay(retry)
    assert retry.content == first.content


@pytest.mark.parametrize("other", ["/orders/2?note=a", "/orders/1?note=b", "/orders/1", "/orders/1?note=a&extra=1"])
async def test_path_values_and_the_query_are_part_of_the_request(other: str) -> None:
    shop = Shop()
    client = connect(shop.app, headers=KEY)
    await client.post("/orders/1?note=a")

    response = await client.post(other)

    assert response.status_code == 422
    assert shop.ran == [("1", "a")]


async def test_headers_are_no_part_of_the_request() -> None:
    client = connect(Shop().app, headers=KEY)
    await client.post("/orders", json={"item": "tea"}, headers={"X-Trace": "1", "User-Agent": "first"})

    assert is_replay(await client.post("/orders", json={"item": "tea"}, headers={"User-Agent": "second"}))


async def test_one_key_means_another_operation_at_another_route() -> None:
    shop = Shop()
    client = connect(shop.app, headers=KEY)
    await client.post("/documents")

    response = await client.post("/orders", json={"item": "tea"})

    assert response.status_code == 201
    assert not is_replay(response)


async def test_one_key_means_another_operation_with_another_method() -> None:
    shop = Shop()
    client = connect(shop.app, headers=KEY)

    responses = [await client.request(method, "/orders/1") for method in ("POST", "PUT", "PATCH", "DELETE")]

    assert [response.json()["run"] for response in responses] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_every_method_that_has_effects_is_protected(method: str) -> None:
    shop = Shop()
    client = connect(shop.app, headers=KEY)

    responses = [await client.request(method, "/orders/1") for _ in range(2)]

    assert is_replay(responses[1])
    assert len(shop.ran) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_method_without_effects_passes_although_it_has_a_key(method: str) -> None:
    shop = Shop(required=True)
    client = connect(shop.app, headers=KEY)

    responses = [await client.request(method, "/orders/1") for _ in range(2)]

    assert [response.status_code for response in responses] == [200, 200]
    assert not any(is_replay(response) for response in responses)
    assert len(shop.ran) == 2


async def test_requests_without_a_key_each_run_and_are_told_nothing() -> None:
    shop = Shop()
    client = connect(shop.app)

    responses = [await client.post("/documents") for _ in range(2)]

    assert len(shop.ran) == 2
    assert not any("x-idempotent-replayed" in response.headers for response in responses)


@pytest.mark.parametrize("status", [500, 501, 502, 503, 504, 401, 403, 408, 409, 423, 425, 429])
@pytest.mark.parametrize("kind", ["status", "refused"])
async def test_an_answer_that_a_retry_may_better_is_not_kept(kind: str, status: int) -> None:
    shop = Shop()

    first, retry = await twice(shop.app, f"/{kind}/{status}")

    assert first.status_code == retry.status_code == status
    assert not is_replay(retry)
    assert shop.ran == [status, status]


@pytest.mark.parametrize("status", [200, 202, 204, 303, 304, 400, 402, 404, 405, 410, 412, 413, 415, 422, 451])
async def test_a_final_answer_is_kept(status: int) -> None:
    shop = Shop()

    first, retry = await twice(shop.app, f"/status/{status}", follow_redirects=False)

    assert (retry.status_code, retry.content) == (first.status_code, first.content)
    assert first.status_code == status
    assert is_replay(retry)
    assert shop.ran == [status]


@pytest.mark.parametrize("status", [404, 422])
async def test_a_final_answer_that_was_raised_is_kept(status: int) -> None:
    shop = Shop()

    first, retry = await twice(shop.app, f"/refused/{status}")

    assert is_replay(retry)
    assert retry.json() == first.json() == {"detail": "run 1"}


async def test_a_failed_validation_is_a_final_answer() -> None:
    shop = Shop()

    first, retry = await twice(shop.app, json={"count": "many"})

    assert first.status_code == 422
    assert is_replay(retry)
    assert retry.content == first.content


async def test_an_unhandled_exception_frees_the_key() -> None:
    shop = Shop()

    first, retry = await twice(shop.app, "/broken")

    assert (first.status_code, retry.status_code) == (500, 200)
    assert shop.ran == ["broken", "broken"]


async def test_an_unhandled_exception_keeps_the_fingerprint_of_nothing() -> None:
    client = connect(Shop().app, headers=KEY)
    await client.post("/broken", content=b"first")

    assert (await client.post("/broken", content=b"changed")).status_code == 200


async def test_a_missing_key_is_refused_where_one_is_required() -> None:
    shop = Shop(required=True)

    response = await connect(shop.app, headers=PROBLEM).post("/orders", json={"item": "tea"})

    assert (response.status_code, response.json()["code"]) == (400, "idempotency_key_missing")
    assert shop.ran == []


async def test_a_key_lets_it_pass_where_one_is_required() -> None:
    first, retry = await twice(Shop(required=True).app, json={"item": "tea"})

    assert first.status_code == 201
    assert is_replay(retry)


MALFORMED = {
    "empty": [b""],
    "empty quotes": [b'""'],
    "space": [b"a b"],
    "surrounding space": [b" a "],
    "open quote": [b'"a'],
    "inner quote": [b'a"b'],
    "backslash": [b'"a\\b"'],
    "latin-1": [b"\xe9"],
    "UTF-8": ["é".encode()],
    "TAB": [b"a\tb"],
    "newline": [b"a\n"],
    "NUL": [b"a\x00"],
    "DEL": [b"a\x7f"],
    "256 bytes": [b"x" * 256],
    "300 bytes": [b"x" * 300],
    "300 bytes in quotes": [b'"' + b"x" * 300 + b'"'],
    "twice the same": [b"a", b"a"],
    "two": [b"a", b"b"],
    "a list": [b"a, b"],
    "parameters": [b'"a"; b=c'],
}


@pytest.mark.parametrize("values", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_key_is_refused_and_never_echoed(values: list[bytes]) -> None:
    shop = Shop()
    scope = http_scope("POST", "/documents", *[(b"idempotency-key", value) for value in values])
    scope["headers"].append((b"accept", b"application/problem+json"))

    wire = await Wire(upload()).run(shop.app, scope)

    assert wire.status == 400
    assert b'"code":"idempotency_key_malformed"' in wire.body
    assert not values[0] or len(values[0]) < 8 or values[0] not in wire.body
    assert shop.ran == []


@pytest.mark.parametrize(
    "key", ["a", "x" * 255, "!#$%&'()*+,-./:;<=>?@[]^_`{|}~", "8e03978e-40d5-43dd-bc93-6894a57f9324"]
)
async def test_a_key_of_visible_ascii_is_taken(key: str) -> None:
    client = connect(Shop().app, headers={"Idempotency-Key": key})
    await client.post("/documents")

    assert is_replay(await client.post("/documents"))


@pytest.mark.parametrize(("first", "second"), [("key_1", '"key_1"'), ('"key_1"', "key_1")])
async def test_a_key_bare_and_in_quotes_is_one_key(first: str, second: str) -> None:
    client = connect(Shop().app)
    await client.post("/documents", headers={"Idempotency-Key": first})

    assert is_replay(await client.post("/documents", headers={"Idempotency-Key": second}))


async def test_keys_that_differ_in_case_are_two_keys() -> None:
    client = connect(Shop().app)
    await client.post("/documents", headers={"Idempotency-Key": "key"})

    assert not is_replay(await client.post("/documents", headers={"Idempotency-Key": "KEY"}))


@pytest.mark.parametrize("headers", [{"X-API-Key": "other"}, {"Authorization": "other"}])
async def test_two_callers_with_one_key_are_two_operations(headers: dict[str, str]) -> None:
    shop = Shop()

    @shop.app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        if user := request.headers.get("authorization"):
            set_context_user(user)
        return await call_next(request)

    first = await connect(shop.app, headers=KEY).post("/orders", json={"item": "tea"})
    second = await connect(shop.app, headers={**KEY, **headers}).post("/orders", json={"item": "milk"})

    assert (first.status_code, second.status_code) == (201, 201)
    assert shop.ran == ["tea", "milk"]


async def test_one_user_who_moves_to_another_address_still_gets_the_reply() -> None:
    shop = Shop()

    @shop.app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        set_context_user("alice")
        return await call_next(request)

    home, office = (connect(shop.app, headers=KEY, address=address) for address in ("192.0.2.1", "192.0.2.2"))
    await home.post("/documents")

    assert is_replay(await office.post("/documents"))


async def test_a_selective_policy_protects_the_named_operation_alone() -> None:
    runs: list[str] = []
    guarded = FastAPI()

    @guarded.post("/named/{name}")
    async def named(name: str) -> None:
        runs.append(name)

    @guarded.post("/other/{name}")
    async def other(name: str) -> None:
        runs.append(name)

    install(guarded, Pipeline([Selective(IdempotencyPolicy(MemoryStore(), required=True), ["POST /named/{name}"])]))
    client = connect(guarded, headers=KEY)

    for path in ("/named/a", "/named/a", "/other/b", "/other/b"):
        await client.post(path)

    assert runs == ["a", "b", "b"]
    assert (await connect(guarded).post("/other/c")).status_code == 200
    assert (await connect(guarded).post("/named/c")).status_code == 400


async def test_a_store_that_is_gone_refuses_a_keyed_request_before_it_runs() -> None:
    shop = Shop()
    shop.store.down = True

    response = await connect(shop.app, headers={**KEY, **PROBLEM}).post("/documents")

    assert (response.status_code, response.json()["code"]) == (503, "store_unavailable")
    assert response.headers["retry-after"] == "1"
    assert shop.ran == []


async def test_a_store_that_is_gone_concerns_nobody_without_a_key() -> None:
    shop = Shop()
    shop.store.down = True

    assert (await connect(shop.app).post("/documents")).status_code == 201


async def test_a_store_that_is_gone_runs_a_keyed_request_unprotected_where_the_policy_is_open() -> None:
    shop = Shop(on_outage="open")
    shop.store.down = True

    first, retry = await twice(shop.app, "/documents")

    assert (first.status_code, retry.status_code) == (201, 201)
    assert len(shop.ran) == 2


async def test_a_reply_leaves_unchanged_although_the_store_goes_while_it_is_made() -> None:
    shop = Shop()

    @shop.app.post("/outage", status_code=201)
    async def outage() -> str:
        shop.store.down = True
        return "done"

    response = await connect(shop.app, headers=KEY).post("/outage")

    assert (response.status_code, response.json()) == (201, "done")


async def test_replays_are_compressed_for_who_accepts_it_and_plain_for_who_does_not() -> None:
    shop = Shop()
    shop.app.add_middleware(GZipMiddleware, minimum_size=1)
    client = connect(shop.app, headers=KEY)
    first = await client.post("/documents", headers={"Accept-Encoding": "gzip"})

    small = await client.post("/documents", headers={"Accept-Encoding": "gzip"})
    plain = await client.post("/documents", headers={"Accept-Encoding": "identity"})

    assert (first.headers["content-encoding"], small.headers["content-encoding"]) == ("gzip", "gzip")
    assert "content-encoding" not in plain.headers
    assert is_replay(small)
    assert is_replay(plain)
    assert first.content == small.content == plain.content


async def test_a_replay_is_shared_with_the_origin_that_asks_and_not_with_the_first_one() -> None:
    shop = Shop()
    shop.app.add_middleware(CORSMiddleware, allow_origins=["https://a.test", "https://b.test"])
    client = connect(shop.app, headers=KEY)
    await client.post("/documents", headers={"Origin": "https://a.test"})

    retry = await client.post("/documents", headers={"Origin": "https://b.test"})

    assert is_replay(retry)
    assert retry.headers.get_list("access-control-allow-origin") == ["https://b.test"]


async def test_a_refusal_can_be_read_across_origins() -> None:
    shop = Shop(required=True)
    shop.app.add_middleware(CORSMiddleware, allow_origins=["https://a.test"])

    response = await connect(shop.app).post("/documents", headers={"Origin": "https://a.test"})

    assert response.status_code == 400
    assert response.headers["access-control-allow-origin"] == "https://a.test"


async def test_a_preflight_is_answered_without_a_key_and_costs_nothing() -> None:
    shop = Shop(RateLimitPolicy(MemoryStore(clock=ManualClock()), "1/minute"), required=True)
    shop.app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    asks = {"Origin": "https://a.test", "Access-Control-Request-Method": "POST"}

    preflights = [(await connect(shop.app).options("/documents", headers=asks)).status_code for _ in range(3)]

    assert preflights == [200, 200, 200]
    assert (await connect(shop.app, headers=KEY).post("/documents")).status_code == 201


async def test_a_refused_rate_leaves_the_key_alone() -> None:
    clock = ManualClock()
    shop = Shop(RateLimitPolicy(MemoryStore(clock=clock), "1/minute"))
    client = connect(shop.app, headers=KEY)
    await client.post("/status/503")
    refused = await client.post("/status/503")
    clock.advance(61)

    retry = await client.post("/status/503")

    assert (refused.status_code, retry.status_code) == (429, 503)
    assert len(shop.ran) == 2
