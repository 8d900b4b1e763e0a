import logging
from collections.abc import AsyncIterator
from email import message_from_bytes
from hashlib import sha256
from typing import Any, cast
from urllib.parse import parse_qs

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from http_middleware import ResilienceMiddleware, install
from resilience import IdempotencyPolicy, MemoryStore, Pipeline
from tests.integration.http_driver import Wire, connect, http_scope, upload

KEY = {"Idempotency-Key": "key_1"}
KEY_HEADER = (b"idempotency-key", b"key_1")
HANG_UP: Message = {"type": "http.disconnect"}


class Desk:
    """An application that notes what its handlers were given."""

    def __init__(self, **options: Any) -> None:
        self.got: list[Any] = []
        self.app = app = FastAPI()

        @app.post("/form")
        async def form(request: Request) -> dict[str, list[str]]:
            values = parse_qs((await request.body()).decode())
            self.got.append(values)
            return values

        @app.post("/file")
        async def file(request: Request) -> list[Any]:
            parts = parse_multipart(request.headers["content-type"], await request.body())
            self.got.append(parts)
            return [len(content) for _, content in parts]

        @app.post("/raw")
        async def raw(request: Request) -> str:
            body = await request.body()
            self.got.append(body)
            return sha256(body).hexdigest()

        @app.post("/stream")
        async def stream(request: Request) -> int:
            body = b"".join([chunk async for chunk in request.stream()])
            self.got.append(body)
            return len(body)

        install(app, Pipeline([IdempotencyPolicy(MemoryStore(), **options)]))


def parse_multipart(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    message = message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    parts = [part for part in message.walk() if not part.is_multipart()]
    return [
        (str(part.get_param("name", header="content-disposition")), cast("bytes", part.get_payload(decode=True)))
        for part in parts
    ]


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get_list("x-idempotent-replayed") == ["true"]


def post(path: str, *headers: tuple[bytes, bytes]) -> Scope:
    return http_scope("POST", path, KEY_HEADER, *headers)


async def test_a_form_reaches_its_endpoint_and_its_retry_is_a_replay() -> None:
    desk = Desk()
    client = connect(desk.app, headers=KEY)

    first, retry = [await client.post("/form", data={"name": "tea", "size": "2"}) for _ in range(2)]

    assert first.json() == retry.json() == {"name": ["tea"], "size": ["2"]}
    assert is_replay(retry)
    assert desk.got == [{"name": ["tea"], "size": ["2"]}]


async def test_a_form_of_another_value_is_another_request() -> None:
    client = connect(Desk().app, headers=KEY)
    await client.post("/form", data={"name": "tea", "size": "2"})

    assert (await client.post("/form", data={"name": "tea", "size": "3"})).status_code == 422


async def test_an_uploaded_file_reaches_its_endpoint_and_its_retry_is_a_replay() -> None:
    desk = Desk()
    client = connect(desk.app, headers=KEY)
    content = bytes(range(256)) * 300
    request = client.build_request("POST", "/file", data={"title": "t"}, files={"document": ("a.bin", content)})
    await request.aread()

    first, retry = [await client.send(request) for _ in range(2)]

    assert first.json() == retry.json() == [1, len(content)]
    assert is_replay(retry)
    assert desk.got == [[("title", b"t"), ("document", content)]]


async def test_an_uploaded_file_of_other_bytes_is_another_request() -> None:
    client = connect(Desk().app, headers={**KEY, "Content-Type": "multipart/form-data; boundary=b"})

    statuses = [
        (await client.post("/file", data={"title": "t"}, files={"document": ("a.bin", content)})).status_code
        for content in (b"one", b"two")
    ]

    assert statuses == [200, 422]


@pytest.mark.parametrize("path", ["/raw", "/stream"])
async def test_a_body_in_chunks_reaches_its_endpoint_whole(path: str) -> None:
    desk = Desk()

    await connect(desk.app, headers=KEY).post(path, content=chunks(b"a" * 1000, b"", b"b" * 1000, b"c"))

    assert desk.got == [b"a" * 1000 + b"b" * 1000 + b"c"]


async def test_chunks_that_are_cut_elsewhere_are_the_same_request() -> None:
    client = connect(Desk().app, headers=KEY)
    await client.post("/raw", content=chunks(b"ab", b"c"))

    assert is_replay(await client.post("/raw", content=chunks(b"a", b"bc")))


async def test_a_request_without_a_body_can_be_keyed() -> None:
    desk = Desk()
    client = connect(desk.app, headers=KEY)

    first, retry = [await client.post("/raw") for _ in range(2)]

    assert first.status_code == 200
    assert is_replay(retry)
    assert desk.got == [b""]


async def test_a_body_that_a_middleware_outside_has_read_is_still_whole() -> None:
    desk = Desk()

    @desk.app.middleware("http")
    async def verify_signature(request: Request, call_next: Any) -> Any:
        assert await request.body() == b"signed"
        return await call_next(request)

    client = connect(desk.app, headers=KEY)

    first, retry = [await client.post("/raw", content=chunks(b"sig", b"ned")) for _ in range(2)]

    assert first.status_code == 200
    assert is_replay(retry)
    assert desk.got == [b"signed"]


async def test_a_middleware_inside_of_the_application_sees_the_client_leave_after_the_body() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])
        await JSONResponse({})(scope, receive, send)

    guarded = ResilienceMiddleware(app, Pipeline([IdempotencyPolicy(MemoryStore())]))

    await Wire([*upload(b"a", b"b"), HANG_UP]).run(guarded, post("/"))

    assert seen == ["http.request", "http.disconnect"]


async def test_a_body_of_exactly_the_bound_is_taken() -> None:
    desk = Desk(max_payload=1024)
    client = connect(desk.app, headers=KEY)

    assert (await client.post("/raw", content=b"x" * 1024)).status_code == 200
    assert len(desk.got[0]) == 1024


async def test_a_body_that_says_it_is_over_the_bound_is_refused_before_any_of_it_is_read() -> None:
    desk = Desk(max_payload=1024)
    wire = Wire(upload(b"x" * 1025))

    await wire.run(desk.app, post("/raw", (b"content-length", b"1025"), (b"accept", b"application/problem+json")))

    assert wire.status == 413
    assert b'"code":"payload_too_large"' in wire.body
    assert len(wire.waiting) == 1
    assert desk.got == []


async def test_a_body_without_a_length_is_refused_once_it_is_over_the_bound() -> None:
    desk = Desk(max_payload=1024)
    wire = Wire(upload(*[b"x" * 256] * 50))

    await wire.run(desk.app, post("/raw", (b"transfer-encoding", b"chunked")))

    assert wire.status == 413
    assert len(wire.waiting) == 45
    assert desk.got == []


@pytest.mark.parametrize("length", [b"10", b"0", b"-1", b"ten", b"9" * 5000, b"\xb2"])
async def test_a_length_that_lies_does_not_let_a_body_over_the_bound_in(length: bytes) -> None:
    desk = Desk(max_payload=1024)

    wire = await Wire(upload(b"x" * 1000, b"x" * 1000)).run(desk.app, post("/raw", (b"content-length", length)))

    assert wire.status == 413
    assert desk.got == []


async def test_a_refused_body_leaves_its_key_free() -> None:
    desk = Desk(max_payload=1024)
    client = connect(desk.app, headers=KEY)
    await client.post("/raw", content=b"x" * 2000)

    response = await client.post("/raw", content=b"small")

    assert response.status_code == 200
    assert not is_replay(response)


async def test_a_body_over_the_bound_passes_without_a_key() -> None:
    desk = Desk(max_payload=1024)

    response = await connect(desk.app).post("/raw", content=b"x" * 5000)

    assert response.status_code == 200
    assert len(desk.got[0]) == 5000


async def test_a_body_without_a_key_is_not_read_ahead() -> None:
    waiting: list[int] = []
    wire = Wire(upload(b"a", b"b"))

    async def lazy(scope: Scope, receive: Receive, send: Send) -> None:
        waiting.append(len(wire.waiting))
        await JSONResponse({})(scope, receive, send)

    await wire.run(ResilienceMiddleware(lazy, Pipeline([IdempotencyPolicy(MemoryStore())])), http_scope("POST", "/"))

    assert waiting == [2]


@pytest.mark.parametrize("before", [[], upload(b"half of", b"it")[:1]], ids=["at once", "half-way"])
async def test_a_client_that_hangs_up_in_its_body_leaves_no_claim_behind(before: list[Message]) -> None:
    desk = Desk()
    await Wire([*before, HANG_UP]).run(desk.app, post("/raw"))

    response = await connect(desk.app, headers=KEY).post("/raw", content=b"all of it")

    assert response.status_code == 200
    assert not is_replay(response)
    assert desk.got == [b"all of it"]


async def test_a_client_that_hangs_up_in_its_body_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    await Wire([*upload(b"half of", b"it")[:1], HANG_UP]).run(Desk().app, post("/raw"))

    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_client_that_hangs_up_in_its_body_is_no_error_to_the_application() -> None:
    desk = Desk()
    reported: list[Exception] = []

    @desk.app.exception_handler(Exception)
    async def report(_request: Request, error: Exception) -> JSONResponse:
        reported.append(error)
        return JSONResponse({}, 500)

    await Wire([*upload(b"half of", b"it")[:1], HANG_UP]).run(desk.app, post("/raw"))

    assert reported == []


async def test_a_client_that_hangs_up_in_its_body_is_no_error_behind_a_middleware_of_the_application() -> None:
    desk = Desk()
    raised: list[Exception] = []

    @desk.app.middleware("http")
    async def reports(request: Request, call_next: Any) -> Any:
        try:
            return await call_next(request)
        except Exception as error:
            raised.append(error)
            raise

    await Wire([*upload(b"half of", b"it")[:1], HANG_UP]).run(desk.app, post("/raw"))

    assert raised == []


async def test_a_client_that_hangs_up_in_its_body_never_reaches_a_raw_application() -> None:
    reached: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        reached.append(scope["path"])

    guarded = ResilienceMiddleware(app, Pipeline([IdempotencyPolicy(MemoryStore())]))

    await Wire([*upload(b"half of", b"it")[:1], HANG_UP]).run(guarded, post("/"))

    assert reached == []
