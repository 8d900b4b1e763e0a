import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from http_middleware import install
from resilience import (
    HealthChecker,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    Rule,
    Selective,
    get_correlation_id,
    get_request_id,
)
from resilience.testing import ManualClock
from tests.integration.http_driver import BOUND, HOST, Ends, dial, read_response, server_of, serving, within

KEY = {"Idempotency-Key": "key_1"}
MAX_PAYLOAD = 4096


class Shop:
    """An application behind a real server, with hooks into its handlers."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        app = FastAPI()
        for path, handler, status in (
            ("/orders", self.create, 201),
            ("/until-the-client-leaves", self.until_the_client_leaves, 201),
            ("/slow", self.slow, 201),
            ("/background", self.background, 202),
            ("/anything", self.anything, 200),
        ):
            app.add_api_route(path, handler, methods=["POST"], status_code=status)
        app.add_api_route("/ids", self.ids)
        app.add_api_route("/limited", lambda: None)
        app.add_api_route("/broken", self.broken)
        app.add_api_route("/stream", self.stream, methods=["GET", "POST"])
        limit = RateLimitPolicy(MemoryStore(clock=ManualClock()), Rule("1/minute", operations=["GET /limited"]))
        keyed = IdempotencyPolicy(MemoryStore(), max_payload=MAX_PAYLOAD)
        install(app, Pipeline([limit, keyed]), health=HealthChecker("1.0.0", "test"))
        self.app = Ends(app)

    async def create(self, request: Request) -> dict[str, Any]:
        body = await request.body()
        self.runs.append(body)
        return {"run": len(self.runs), "size": len(body)}

    async def until_the_client_leaves(self, request: Request) -> str:
        self.started.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.runs.append("finished")
        return "done"

    async def slow(self) -> int:
        self.runs.append("slow")
        self.started.set()
        await within(self.go_on.wait())
        return len(self.runs)

    async def background(self, tasks: BackgroundTasks) -> str:
        tasks.add_task(self.slow)
        return "accepted"

    async def anything(self, request: Request) -> list[Any]:
        return [len(await request.body()), get_request_id()]

    async def ids(self) -> list[str | None]:
        return [get_request_id(), get_correlation_id()]

    async def broken(self) -> None:
        raise RuntimeError("broken")

    async def stream(self) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            await within(self.go_on.wait())
            yield b"last"

        return StreamingResponse(chunks())


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get_list("x-idempotent-replayed") == ["true"]


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def raw_post(path: str, length: int, body: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nIdempotency-Key: key_1\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + body


async def test_a_keyed_post_over_the_wire_runs_once() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port, headers=KEY) as client:
        first, retry = [await client.post("/orders", json={"item": "tea"}) for _ in range(2)]

    assert (first.status_code, retry.status_code) == (201, 201)
    assert first.content == retry.content
    assert is_replay(retry)
    assert len(shop.runs) == 1


async def test_a_replay_over_the_wire_has_one_date_and_one_length() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port, headers=KEY) as client:
        retry = [await client.post("/orders") for _ in range(2)][1]

    assert [len(retry.headers.get_list(name)) for name in ("date", "server", "content-length")] == [1, 1, 1]


async def test_a_chunked_upload_over_the_wire_reaches_its_endpoint_and_its_retry_is_a_replay() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port, headers=KEY) as client:
        first = await client.post("/orders", content=chunks(b"a" * 1000, b"b" * 1000))
        retry = await client.post("/orders", content=chunks(b"a" * 500, b"a" * 500, b"b" * 1000))

    assert first.json() == {"run": 1, "size": 2000}
    assert is_replay(retry)
    assert shop.runs == [b"a" * 1000 + b"b" * 1000]


async def test_an_upload_over_the_bound_is_refused_over_the_wire_and_the_next_request_is_served() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port) as client:
        refused = await client.post("/orders", content=b"x" * (MAX_PAYLOAD + 1), headers=KEY)
        served = await client.post("/orders", content=b"x" * MAX_PAYLOAD, headers=KEY)

    assert (refused.status_code, served.status_code) == (413, 201)
    assert [len(body) for body in shop.runs] == [MAX_PAYLOAD]


async def test_work_whose_client_leaves_is_finished_and_its_retry_is_a_replay() -> None:
    shop = Shop()
    async with serving(shop.app) as port:
        _, writer = await within(asyncio.open_connection(HOST, port))
        writer.write(raw_post("/until-the-client-leaves", 0))
        await within(shop.started.wait())
        writer.close()
        await within(writer.wait_closed())
        await shop.app.next()
        async with dial(port, headers=KEY) as client:
            retry = await client.post("/until-the-client-leaves")

    assert is_replay(retry)
    assert (retry.status_code, retry.json()) == (201, "done")
    assert shop.runs == ["finished"]


@pytest.mark.parametrize("sent", [b"", b"half of it"])
async def test_a_client_that_hangs_up_in_its_upload_leaves_no_claim_and_no_error_behind(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop()
    async with serving(shop.app) as port:
        _, writer = await within(asyncio.open_connection(HOST, port))
        writer.write(raw_post("/orders", 20, sent))
        await within(writer.drain())
        writer.close()
        await within(writer.wait_closed())
        await shop.app.next()
        async with dial(port, headers=KEY) as client:
            retry = await client.post("/orders", content=b"all of it")

    assert retry.status_code == 201
    assert not is_replay(retry)
    assert shop.runs == [b"all of it"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_of_twenty_identical_requests_over_the_wire_one_runs() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port, headers=KEY) as client:
        first = asyncio.create_task(client.post("/slow"))
        await within(shop.started.wait())
        twins = await asyncio.gather(*(client.post("/slow") for _ in range(19)))
        shop.go_on.set()
        reply = await within(first)

    assert reply.status_code == 201
    assert {twin.status_code for twin in twins} == {409}
    assert all(int(twin.headers["retry-after"]) >= 1 for twin in twins)
    assert shop.runs == ["slow"]


async def test_a_retry_while_the_background_task_runs_is_a_replay_over_the_wire() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port, headers=KEY) as client:
        await client.post("/background")
        await within(shop.started.wait())
        retry = await client.post("/background")
        shop.go_on.set()

    assert is_replay(retry)
    assert shop.runs == ["slow"]


async def test_a_stream_leaves_piece_by_piece() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port) as client, client.stream("GET", "/stream") as response:
        pieces = response.aiter_bytes()
        first = await within(anext(pieces))
        shop.go_on.set()
        rest = [piece async for piece in pieces]

    assert first == b"first"
    assert b"".join(rest) == b"last"
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_keyed_stream_leaves_piece_by_piece_and_is_replayed_whole() -> None:
    shop = Shop()
    async with serving(shop.app) as port, dial(port, headers=KEY) as client:
        async with client.stream("POST", "/stream") as response:
            pieces = response.aiter_bytes()
            first = await within(anext(pieces))
            shop.go_on.set()
            rest = [piece async for piece in pieces]
        retry = await client.post("/stream")

    assert (first, b"".join(rest)) == (b"first", b"last")
    assert is_replay(retry)
    assert retry.content == b"firstlast"


async def test_a_refusal_over_the_wire() -> None:
    async with serving(Shop().app) as port, dial(port) as client:
        await client.get("/limited")
        refused = await client.get("/limited")

    assert refused.status_code == 429
    assert refused.json() == {"detail": "Too many requests", "retry_after": int(refused.headers["retry-after"])}


async def test_an_unhandled_error_over_the_wire_carries_ids_and_is_told_to_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(Shop().app) as port, dial(port) as client:
        response = await client.get("/broken")

    assert response.status_code == 500
    assert response.headers["x-request-id"].startswith("req_")
    assert [record.name for record in caplog.records if record.levelno >= logging.ERROR] == ["uvicorn.error"]


@pytest.mark.parametrize(
    "sent",
    [b"abc\x85def", b"abc\tdef", b"abc\x1b[31mdef", b'"abc"', b"abc def", b"abc\xff", b"x" * 129, b"x" * 61_440],
    ids=["NEL", "TAB", "ESC", "quotes", "space", "0xff", "129 bytes", "60 KiB"],
)
async def test_what_a_server_lets_through_as_an_id_is_replaced_and_never_echoed(sent: bytes) -> None:
    async with serving(Shop().app, http="h11") as port:  # the most permissive one: httptools refuses an ESC itself
        reader, writer = await within(asyncio.open_connection(HOST, port))
        writer.write(b"GET /ids HTTP/1.1\r\nHost: test\r\nX-Correlation-ID: " + sent + b"\r\n\r\n")
        head, body = await read_response(reader)
        writer.close()
        await within(writer.wait_closed())

    assert head.startswith(b"HTTP/1.1 200 ")
    assert sent not in head + body
    assert head.lower().count(b"\r\nx-correlation-id: ") == 1


async def test_a_request_behind_another_on_one_connection_has_ids_of_its_own() -> None:
    pipelined = b"".join(
        b"GET /ids HTTP/1.1\r\nHost: test\r\nX-Correlation-ID: " + name + b"\r\n\r\n" for name in (b"first", b"second")
    )
    async with serving(Shop().app) as port:
        reader, writer = await within(asyncio.open_connection(HOST, port))
        writer.write(pipelined)
        answers = [await read_response(reader) for _ in range(2)]
        writer.close()
        await within(writer.wait_closed())

    assert [name in head + body for name, (head, body) in zip((b"first", b"second"), answers, strict=True)] == [
        True,
        True,
    ]
    assert b"first" not in answers[1][0] + answers[1][1]


async def test_a_request_after_a_large_upload_on_one_connection_has_ids_of_its_own() -> None:
    async with serving(Shop().app) as port, dial(port, limits=httpx.Limits(max_connections=1)) as client:
        first = await client.post("/anything", content=b"x" * 1_000_000)
        second = await client.get("/ids")

    assert first.json() == [1_000_000, first.headers["x-request-id"]]
    assert second.json() == [second.headers["x-request-id"], second.headers["x-correlation-id"]]
    assert second.headers["x-request-id"] != first.headers["x-request-id"]


@pytest.mark.parametrize(("method", "body"), [("GET", True), ("HEAD", False)])
async def test_a_probe_over_the_wire(method: str, body: bool) -> None:
    async with serving(Shop().app) as port, dial(port) as client:
        response = await client.request(method, "/health/ready")

    assert response.status_code == 200
    assert bool(response.content) is body
    assert "x-request-id" not in response.headers


async def test_a_probe_is_found_below_the_root_path_that_a_server_is_given() -> None:
    async with serving(Shop().app, root_path="/api") as port, dial(port) as client:
        response = await client.get("/health")

    assert response.status_code == 200
    assert response.json()["version"] == "1.0.0"


async def test_a_server_does_not_start_with_a_policy_for_a_route_that_is_not_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    install(app, Pipeline([Selective(IdempotencyPolicy(MemoryStore()), ["POST /nowhere"])]))
    server = server_of(app)

    with socket.socket() as bound:
        bound.bind((HOST, 0))
        with suppress(SystemExit):  # an older uvicorn just returns
            async with asyncio.timeout(BOUND):
                await server.serve([bound])

    assert not server.started
    assert "POST /nowhere" in caplog.text
