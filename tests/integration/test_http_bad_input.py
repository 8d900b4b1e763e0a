"""What no well-meaning client sends, through both parsers that uvicorn has: nothing of it is echoed, and nothing runs.

Each parser lets other bytes through, and ends a broken body in its own way. What the door makes of them without a
server in front stands in ``test_http_ids``, ``test_http_idempotency`` and ``test_http_idempotency_bodies``.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI, Request

from http_middleware import idempotent, install
from http_middleware.client_address import ClientAddress
from resilience import (
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    Rule,
    Selective,
    get_correlation_id,
    get_request_context,
)
from resilience.policies.idempotency import MAX_PAYLOAD
from resilience.testing import ManualClock
from tests.integration.http_driver import HOST, Ends, read_response, serving, within

# One server for each parser: starting one takes longer than all that is sent to it.
pytestmark = pytest.mark.asyncio(loop_scope="module")

BOUND = 4096
PROBLEM = b"Accept: application/problem+json\r\n"
JSON = b"Content-Type: application/json\r\n"
CHUNKED, LAST = b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"
# A header of 60 KiB is within httptools' bounds; h11's own is 16 KiB unless it is told otherwise.
PARSERS: dict[str, dict[str, Any]] = {
    "h11": {"http": "h11", "h11_max_incomplete_event_size": 2**17},
    "httptools": {"http": "httptools"},
}
each_door = pytest.mark.parametrize("path", ["/core", "/late", "/parsed"])
each_raw_door = pytest.mark.parametrize("path", ["/core", "/late"])
each_bound = pytest.mark.parametrize(("path", "bound"), [("/core", BOUND), ("/late", MAX_PAYLOAD)])
_cases = count()


class Desk:
    """An application that notes what ran. A policy keys ``/core``; decorators key ``/late`` and ``/parsed``."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.clock = ManualClock()
        self.case = ""
        app = FastAPI()
        app.add_api_route("/ids", self.ids)
        app.add_api_route("/limited", lambda: "let in")
        app.add_api_route("/core/{case}", self.core, methods=["POST"])
        app.add_api_route("/late/{case}", self.late, methods=["POST"])
        app.add_api_route("/parsed/{case}", self.parsed, methods=["POST"])
        store = MemoryStore(clock=self.clock)
        limit = RateLimitPolicy(store, Rule("2/minute", operations=["GET /limited"]))
        keyed = Selective(IdempotencyPolicy(store, max_payload=BOUND), ["POST /core/{case}"])
        install(app, Pipeline([limit, keyed]), address=ClientAddress(trusted=[HOST, "10.0.0.0/8"]))
        self.app = Ends(app)

    def begin(self) -> None:
        """Forget the test before."""
        self.runs.clear()
        self.clock.advance(120)
        self.case = f"case-{next(_cases)}"

    async def end_of(self, path: str) -> None:
        """Wait until a request of this test has ended."""
        while await self.app.next() != f"{path}/{self.case}":
            pass

    async def ids(self) -> list[str | None]:
        context = get_request_context()
        return [get_correlation_id(), context.parent_request_id, context.traceparent, context.tracestate]

    async def core(self, request: Request) -> int:
        self.runs.append(await request.body())
        return len(self.runs)

    @idempotent()
    async def late(self, request: Request) -> int:
        self.runs.append(await request.body())
        return len(self.runs)

    @idempotent()
    async def parsed(self, data: dict[str, str]) -> int:
        self.runs.append(data)
        return len(self.runs)

    def post(self, path: str, *headers: bytes) -> bytes:
        """Return the head of a request of this test."""
        target = f"{path}/{self.case}".encode()
        return b"POST %s HTTP/1.1\r\nHost: test\r\n%s%s\r\n" % (target, PROBLEM, b"".join(headers))

    @property
    def key(self) -> bytes:
        """A key that no other test has."""
        return b"Idempotency-Key: %s\r\n" % self.case.encode()


class Line:
    """One connection, on which a test says exactly what is sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._writer.write(piece)
            await within(self._writer.drain())

    async def answer(self) -> tuple[int, bytes, bytes]:
        """Return the status, the head and the body of the next answer."""
        head, body = await read_response(self._reader)
        return int(head.split(b" ")[1]), head, body

    async def ask(self, *pieces: bytes) -> tuple[int, bytes, bytes]:
        await self.send(*pieces)
        return await self.answer()

    async def rest(self) -> bytes:
        """Return whatever the server sends until it closes."""
        return await within(self._reader.read())

    def stop_sending(self) -> None:
        self._writer.write_eof()

    async def close(self) -> None:
        self._writer.close()
        await within(self._writer.wait_closed())


class Server:
    """A running server: its application, its parser, and lines to it."""

    def __init__(self, desk: Desk, parser: str, port: int) -> None:
        self.desk = desk
        self.parser = parser
        self._port = port

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        line = Line(*await within(asyncio.open_connection(HOST, self._port)))
        try:
            yield line
        finally:
            await line.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PARSERS)
async def running(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    desk = Desk()
    # The addresses of proxies are ours to find, not the server's.
    async with serving(desk.app, proxy_headers=False, **PARSERS[request.param]) as port:
        yield Server(desk, request.param, port)


@pytest.fixture
def desk(running: Server) -> Desk:
    running.desk.begin()
    return running.desk


@pytest_asyncio.fixture(loop_scope="module")
async def line(running: Server, desk: Desk) -> AsyncIterator[Line]:  # noqa: ARG001 - a new test begins
    async with running.line() as line:
        yield line


def get(path: str, *headers: bytes) -> bytes:
    return b"GET %s HTTP/1.1\r\nHost: test\r\n%s\r\n" % (path.encode(), b"".join(headers))


def length(size: int) -> bytes:
    return b"Content-Length: %d\r\n" % size


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


# -- ids

IDS = {
    "60 KiB": b"x" * 61_440,
    "129 bytes": b"x" * 129,
    "NEL": b"abc\x85def",
    "TAB": b"abc\tdef",
    "0xff": b"abc\xff",
    "quotes": b'"abc"',
    "space": b"abc def",
    "escaped newline": b"abc%0adef",
    "uuid behind 60,000 dashes": b"-" * 60_000 + b"f81d4fae7dec11d0a76500a0c91e6bf6",
    "uuid in braces": b"{f81d4fae-7dec-11d0-a765-00a0c91e6bf6}",
    "uuid with a trailing NEL": b"f81d4fae-7dec-11d0-a765-00a0c91e6bf6\x85",
}
# What httptools refuses by itself.
CONTROLS = {"ESC": b"abc\x1b[31mdef", "DEL": b"abc\x7fdef", "BEL": b"abc\x07def"}


@pytest.mark.parametrize("name", [b"X-Correlation-ID", b"X-Request-ID", b"traceparent"])
@pytest.mark.parametrize("sent", IDS.values(), ids=IDS)
async def test_an_id_that_is_none_is_replaced_and_never_echoed(line: Line, name: bytes, sent: bytes) -> None:
    status, head, body = await line.ask(get("/ids", name + b": " + sent + b"\r\n"))

    assert status == 200
    assert sent not in head + body
    assert b"\r\nx-request-id: req_" in head.lower()
    assert head.lower().count(b"\r\nx-correlation-id: ") == 1


@pytest.mark.parametrize("name", [b"X-Correlation-ID", b"X-Request-ID", b"Idempotency-Key"])
@pytest.mark.parametrize("sent", CONTROLS.values(), ids=CONTROLS)
async def test_a_control_byte_is_never_echoed_whoever_refuses_it(
    running: Server, line: Line, name: bytes, sent: bytes
) -> None:
    desk = running.desk
    status, head, body = await line.ask(desk.post("/core", length(0), name + b": " + sent + b"\r\n"))

    refused = running.parser == "httptools" or name == b"Idempotency-Key"
    assert status == (400 if refused else 200)
    assert sent not in head + body
    assert len(desk.runs) == (0 if refused else 1)


async def test_a_folded_line_is_no_id_and_starts_no_header_of_its_own(line: Line) -> None:
    status, head, body = await line.ask(get("/ids", b"X-Correlation-ID: abc\r\n x-evil: 1\r\n"))

    assert status in (200, 400)
    assert b"evil" not in head + body


async def test_state_that_no_tracer_sends_goes_no_further(line: Line) -> None:
    trace = b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"
    status, _, body = await line.ask(get("/ids", trace, b"tracestate: a=\x85evil\r\n"))

    assert (status, b"4bf92f35" in body, b"evil" in body) == (200, True, False)


# -- keys

KEYS = {
    "twice the same": [b"key_1", b"key_1"],
    "two": [b"key_1", b"key_2"],
    "bare and in quotes": [b"key_1", b'"key_1"'],
    "a list": [b"key_1, key_2"],
    "quotes inside": [b'"key"1"'],
    "an open quote": [b'"key_1'],
    "nothing in quotes": [b'""'],
    "empty": [b""],
    "256 bytes": [b"k" * 256],
    "60 KiB": [b"k" * 61_440],
    "60 KiB in quotes": [b'"' + b"k" * 61_440 + b'"'],
    "NEL": [b"key\x851"],
    "TAB": [b"key\t1"],
    "0xff": [b"key\xff1"],
    "no-break space": [b"\xa0key_1"],
}


@each_door
@pytest.mark.parametrize("values", KEYS.values(), ids=KEYS)
async def test_a_key_that_is_none_is_refused_and_nothing_runs(
    desk: Desk, line: Line, path: str, values: list[bytes]
) -> None:
    lines = [b"Idempotency-Key: " + value + b"\r\n" for value in values]
    status, head, body = await line.ask(desk.post(path, *lines, JSON, length(2)), b"{}")

    assert status == 400
    assert b'"code":"idempotency_key_malformed"' in body
    assert not any(len(value) > 4 and value in head + body for value in values)
    assert desk.runs == []


@each_raw_door
async def test_a_key_in_quotes_is_the_key_without_them(desk: Desk, line: Line, path: str) -> None:
    name = desk.case.encode()
    for value in (name, b'"' + name + b'"'):
        status, _, body = await line.ask(desk.post(path, b"Idempotency-Key: " + value + b"\r\n", length(1)), b"a")
        assert (status, body) == (200, b"1")

    assert desk.runs == [b"a"]


# -- lengths that lie


@each_door
@pytest.mark.parametrize("hangs_up", [True, False], ids=["hangs up", "sends no more"])
async def test_a_body_shorter_than_its_length_never_runs_and_leaves_its_key_free(
    running: Server, desk: Desk, path: str, hangs_up: bool
) -> None:
    async with running.line() as line:
        await line.send(desk.post(path, desk.key, JSON, length(40)), b'{"half": "of')
        if not hangs_up:
            line.stop_sending()
            await line.rest()
    await desk.end_of(path)
    body = b'{"all": "of it"}'
    async with running.line() as line:
        again = await line.ask(desk.post(path, desk.key, JSON, length(len(body))), body)

    assert (again[0], again[2]) == (200, b"1")
    assert len(desk.runs) == 1


@each_door
async def test_a_client_that_hangs_up_in_its_body_is_no_error_in_the_servers_log(
    running: Server, desk: Desk, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running.line() as line:
        await line.send(desk.post(path, desk.key, JSON, length(40)), b'{"half": "of')
    await desk.end_of(path)
    async with running.line() as line:  # by its answer, the server has done with the request before
        await line.ask(get("/ids"))

    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@each_raw_door
async def test_what_follows_a_body_is_no_part_of_it_and_nothing_to_run(desk: Desk, line: Line, path: str) -> None:
    await line.send(desk.post(path, desk.key, length(3)) + b"abcdef" * 10 + b"\r\n\r\n")
    answers = await line.rest()

    assert b"HTTP/1.1 400 " in answers  # to what follows; httptools says it of both
    assert desk.runs in ([], [b"abc"])


@each_raw_door
async def test_a_request_behind_a_body_is_one_of_its_own_with_its_own_key(desk: Desk, line: Line, path: str) -> None:
    await line.send((desk.post(path, desk.key, length(3)) + b"abc") * 2)
    first, second = [await line.answer() for _ in range(2)]

    assert [first[2], second[2]] == [b"1", b"1"]
    assert [b"x-idempotent-replayed: true" in head.lower() for _, head, _ in (first, second)] == [False, True]
    assert desk.runs == [b"abc"]


async def test_a_length_beside_chunks_lets_no_body_over_the_bound_in(desk: Desk, line: Line) -> None:
    status, *_ = await line.ask(desk.post("/core", desk.key, length(3), CHUNKED) + chunk(b"x" * (BOUND + 1)))

    assert status in (400, 413)  # a parser may refuse the pair of them
    assert desk.runs == []


# -- bodies over the bound


@each_bound
async def test_a_keyed_body_in_chunks_is_refused_as_soon_as_it_is_over_the_bound(
    desk: Desk, line: Line, path: str, bound: int
) -> None:
    pieces = [chunk(b"x" * 1024)] * (bound // 1024 + 1)  # and the last one never comes
    status, head, body = await line.ask(desk.post(path, desk.key, CHUNKED), *pieces)

    assert status == 413
    assert b'"code":"payload_too_large"' in body
    assert b"\r\nx-request-id: req_" in head.lower()
    assert desk.runs == []


@each_bound
async def test_a_keyed_body_that_says_it_is_over_the_bound_is_refused_before_it_is_sent(
    desk: Desk, line: Line, path: str, bound: int
) -> None:
    status, _, body = await line.ask(desk.post(path, desk.key, length(bound + 1)))

    assert (status, b'"code":"payload_too_large"' in body) == (413, True)
    assert desk.runs == []


async def test_a_keyed_body_over_the_bound_is_refused_although_fastapi_has_parsed_it(desk: Desk, line: Line) -> None:
    data = b'{"a": "%s"}' % (b"x" * MAX_PAYLOAD)
    status, _, body = await line.ask(desk.post("/parsed", desk.key, CHUNKED, JSON), chunk(data), LAST)

    assert (status, b'"code":"payload_too_large"' in body) == (413, True)
    assert desk.runs == []


@each_bound
async def test_a_keyed_body_of_exactly_the_bound_is_taken(desk: Desk, line: Line, path: str, bound: int) -> None:
    status, *_ = await line.ask(desk.post(path, desk.key, CHUNKED), *[chunk(b"x" * 1024)] * (bound // 1024), LAST)

    assert status == 200
    assert [len(body) for body in desk.runs] == [bound]


@each_bound
async def test_a_body_over_the_bound_passes_without_a_key(desk: Desk, line: Line, path: str, bound: int) -> None:
    status, *_ = await line.ask(desk.post(path, CHUNKED), *[chunk(b"x" * 1024)] * (bound // 1024 + 1), LAST)

    assert status == 200
    assert [len(body) for body in desk.runs] == [bound + 1024]


# -- addresses

FORGED = {
    "one more in front": b"X-Forwarded-For: 198.51.100.%d, 203.0.113.9\r\n",
    "a line of its own in front": b"X-Forwarded-For: 198.51.100.%d\r\nX-Forwarded-For: 203.0.113.9\r\n",
    "a trusted one in front": b"X-Forwarded-For: 198.51.100.%d, 10.0.0.1, 203.0.113.9, 10.0.0.2\r\n",
    "60 KiB in front": b"X-Forwarded-For: 198.51.100.%d, " + b"10.0.0.1," * 6_800 + b" 203.0.113.9\r\n",
    "bytes in front": b"X-Forwarded-For: \x85\xff\t%d, 203.0.113.9\r\n",
    "other headers": b"Forwarded: for=198.51.100.%d\r\nX-Forwarded-For: 203.0.113.9\r\nX-Real-IP: 198.51.100.%d\r\n",
    "no address at the end": b"X-Forwarded-For: 198.51.100.%d, unknown\r\n",
}


@pytest.mark.parametrize("chain", FORGED.values(), ids=FORGED)
async def test_a_forged_chain_buys_no_quota(line: Line, chain: bytes) -> None:
    answers = [await line.ask(get("/limited", chain.replace(b"%d", b"%d" % n))) for n in range(4)]

    assert [status for status, *_ in answers] == [200, 200, 429, 429]
