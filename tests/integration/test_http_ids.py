import logging
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from http_middleware import ResilienceMiddleware, install
from resilience import Pipeline, get_correlation_id, get_request_context, get_request_id, get_tracing_headers
from tests.integration.http_driver import Wire, connect, http_scope

REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
MINTED = re.compile(r"[0-9a-f]{32}")
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


class TeapotError(Exception):
    pass


async def on_teapot(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "teapot"}, 418)


async def ok() -> dict[str, str | None]:
    context = get_request_context()
    return {
        "request_id": context.request_id,
        "correlation_id": context.correlation_id,
        "parent_request_id": context.parent_request_id,
    }


async def read_number(number: int) -> int:
    return number


async def forbidden() -> None:
    raise HTTPException(403)


async def teapot() -> None:
    raise TeapotError


async def broken() -> None:
    raise RuntimeError("broken")


async def moved() -> Response:
    return RedirectResponse("/ok")


async def stream() -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    return StreamingResponse(chunks())


async def own() -> Response:
    response = PlainTextResponse("own", headers={"X-Request-ID": "mine", "X-Correlation-Id": "mine"})
    response.headers.append("x-request-id", "mine, too")
    return response


def build() -> FastAPI:
    app = FastAPI()
    app.add_exception_handler(TeapotError, on_teapot)
    app.add_api_route("/ok", ok)
    app.add_api_route("/numbers/{number}", read_number)
    app.add_api_route("/forbidden", forbidden)
    app.add_api_route("/teapot", teapot)
    app.add_api_route("/broken", broken)
    app.add_api_route("/moved", moved)
    app.add_api_route("/stream", stream)
    app.add_api_route("/own", own)
    app.add_api_route("/forward", get_tracing_headers)
    install(app, Pipeline())
    return app


def ids_of(headers: httpx.Headers) -> tuple[str, str]:
    (request_id,) = headers.get_list("x-request-id")
    (correlation_id,) = headers.get_list("x-correlation-id")
    return request_id, correlation_id


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ok", 200),
        ("GET", "/nowhere", 404),
        ("POST", "/ok", 405),
        ("GET", "/numbers/many", 422),
        ("GET", "/forbidden", 403),
        ("GET", "/teapot", 418),
        ("GET", "/broken", 500),
        ("GET", "/moved", 307),
        ("GET", "/ok/", 307),
        ("GET", "/stream", 200),
        ("GET", "/own", 200),
    ],
)
async def test_every_response_carries_each_id_once_from_the_first_request_on(
    method: str, path: str, status: int
) -> None:
    response = await connect(build()).request(method, path)

    request_id, correlation_id = ids_of(response.headers)
    assert response.status_code == status
    assert REQUEST_ID.fullmatch(request_id)
    assert MINTED.fullmatch(correlation_id)


async def test_the_applications_own_handler_for_unhandled_errors_sees_the_ids_that_leave() -> None:
    app = build()

    @app.exception_handler(Exception)
    async def on_error(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"seen": [get_request_id(), get_correlation_id()]}, 500)

    response = await connect(app).get("/broken")

    assert tuple(response.json()["seen"]) == ids_of(response.headers)


async def test_a_sync_handler_for_unhandled_errors_sees_the_ids_that_leave() -> None:
    app = build()

    @app.exception_handler(Exception)
    def on_error(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"seen": [get_request_id(), get_correlation_id()]}, 500)

    response = await connect(app).get("/broken")

    assert tuple(response.json()["seen"]) == ids_of(response.headers)


async def test_the_endpoint_sees_the_ids_that_leave() -> None:
    response = await connect(build()).get("/ok")

    assert (response.json()["request_id"], response.json()["correlation_id"]) == ids_of(response.headers)


async def test_two_requests_never_share_an_id() -> None:
    client = connect(build())

    seen = [ids_of((await client.get("/ok")).headers) for _ in range(600)]  # more than one pool of the mint

    assert len({value for pair in seen for value in pair}) == 1200


@pytest.mark.parametrize(
    "sent",
    [
        "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
        "F81D4FAE7DEC11D0A76500A0C91E6BF6",
        "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "Root=1-5759e988-bd862e3fe1be46a994272793",
        "req_0123",
        "a",
        "x" * 128,
    ],
    ids=["uuid", "hex", "ulid", "x-ray", "ours", "one character", "128 characters"],
)
async def test_a_valid_correlation_id_is_kept(sent: str) -> None:
    response = await connect(build()).get("/ok", headers={"X-Correlation-ID": sent})

    assert ids_of(response.headers)[1] == sent
    assert response.json()["correlation_id"] == sent


INVALID = {
    "60 KiB": b"x" * 61_440,
    "129 characters": b"x" * 129,
    "empty": b"",
    "TAB": b"abc\tdef",
    "NEL": b"abc\x85def",
    "UTF-8": "abc\u00e9".encode(),
    "ESC": b"abc\x1b[31mdef",
    "DEL": b"abc\x7f",
    "NUL": b"abc\x00def",
    "double quotes": b'"abc"',
    "single quote": b"abc'def",
    "space": b"abc def",
    "leading space": b" abcdef",
    "CRLF": b"abc\r\nx-evil: 1",
    "trailing newline": b"abcdef\n",
    "comma": b"abc,def",
    "semicolon": b"abc;def",
    "percent": b"abc%0adef",
    "markup": b"<abc>",
}


@pytest.mark.parametrize("name", [b"x-correlation-id", b"x-request-id"])
@pytest.mark.parametrize("sent", INVALID.values(), ids=INVALID.keys())
async def test_an_invalid_id_is_replaced_and_never_echoed(
    name: bytes, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    wire = await Wire().run(build(), http_scope("GET", "/ok", (name, sent)))

    request_id, correlation_id = ids_of(wire.headers)
    assert wire.status == 200
    assert REQUEST_ID.fullmatch(request_id)
    assert MINTED.fullmatch(correlation_id)
    assert b'"parent_request_id":null' in wire.body
    if sent:
        assert sent not in b"".join(value for header in wire.sent[0]["headers"] for value in header) + wire.body
        assert sent.decode("latin-1") not in caplog.text


async def test_an_inbound_request_id_becomes_the_parent_and_a_new_one_is_minted() -> None:
    response = await connect(build()).get("/ok", headers={"X-Request-ID": "req_of_the_caller"})

    request_id, correlation_id = ids_of(response.headers)
    assert response.json()["parent_request_id"] == "req_of_the_caller"
    assert REQUEST_ID.fullmatch(request_id)
    assert MINTED.fullmatch(correlation_id)


async def test_the_trace_id_of_a_traceparent_is_the_correlation_id() -> None:
    response = await connect(build()).get("/ok", headers={"traceparent": TRACEPARENT})

    assert ids_of(response.headers)[1] == TRACE_ID


async def test_a_valid_correlation_id_goes_before_the_trace_id() -> None:
    response = await connect(build()).get("/ok", headers={"traceparent": TRACEPARENT, "X-Correlation-ID": "mine"})

    assert ids_of(response.headers)[1] == "mine"


async def test_an_invalid_correlation_id_gives_way_to_the_trace_id() -> None:
    response = await connect(build()).get("/ok", headers={"traceparent": TRACEPARENT, "X-Correlation-ID": "not mine"})

    assert ids_of(response.headers)[1] == TRACE_ID


@pytest.mark.parametrize(
    "sent",
    [
        TRACEPARENT.upper(),
        TRACEPARENT.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        TRACEPARENT + "-extra",
        TRACE_ID,
    ],
    ids=["capitals", "version ff", "zero trace", "zero span", "extra field in version 00", "no traceparent"],
)
async def test_an_invalid_traceparent_is_ignored(sent: str) -> None:
    response = await connect(build()).get("/ok", headers={"traceparent": sent})

    correlation_id = ids_of(response.headers)[1]
    assert MINTED.fullmatch(correlation_id)
    assert correlation_id not in sent.lower()


async def test_the_next_service_gets_both_ids_and_the_trace_context_unchanged() -> None:
    sent = {"X-Correlation-ID": "mine", "traceparent": TRACEPARENT, "tracestate": "vendor=1"}

    response = await connect(build()).get("/forward", headers=sent)

    assert response.json() == {
        "x-correlation-id": "mine",
        "x-request-id": ids_of(response.headers)[0],
        "traceparent": TRACEPARENT,
        "tracestate": "vendor=1",
    }


async def test_of_two_correlation_ids_the_first_counts() -> None:
    headers = [(b"x-correlation-id", b"first"), (b"x-correlation-id", b"second")]

    wire = await Wire().run(build(), http_scope("GET", "/ok", *headers))

    assert ids_of(wire.headers)[1] == "first"


async def test_the_applications_header_list_is_not_changed() -> None:
    response = Response("fixed")
    before = list(response.raw_headers)

    await Wire().run(ResilienceMiddleware(response, Pipeline()), http_scope())

    assert response.raw_headers == before
