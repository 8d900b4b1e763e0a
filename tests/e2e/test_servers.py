"""The demo's HTTP door behind the servers that people use, each a process of its own, started by its command line."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.redis_servers import free_port

ROOT = Path(__file__).parents[2]
TARGET = "tests.support.payments_asgi:app"
BOUND = 20.0  # Seconds that any one wait may take.
LIMIT = 5
PAYMENT = b'{"amount": 100, "currency": "EUR"}'

_UVICORN = "uvicorn --no-access-log --port {port}"
SERVERS = {
    "uvicorn-h11": f"{_UVICORN} --http h11 --loop asyncio {TARGET}",
    "uvicorn-httptools": f"{_UVICORN} --http httptools --loop asyncio {TARGET}",
    "uvicorn-uvloop": f"{_UVICORN} --http httptools --loop uvloop {TARGET}",
    "hypercorn": f"hypercorn --bind 127.0.0.1:{{port}} {TARGET}",
    "granian": f"granian --interface asgi --port {{port}} {TARGET}",
}


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def visit(self) -> httpx.Client:
        """Return the client of a caller with a quota of its own."""
        headers = {"x-api-key": secrets.token_hex(8), "content-type": "application/json"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=BOUND, trust_env=False)


@contextlib.contextmanager
def serve(name: str, folder: Path) -> Iterator[Served]:
    """Start a server, wait until it answers, and end it."""
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", *SERVERS[name].format(port=port).split()]
    settings = {"RATE_LIMIT_REQUESTS": str(LIMIT), "PROCESSING_SECONDS": "0"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=file, stderr=file)
    served = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        _until_it_answers(served)
        yield served
    finally:
        process.terminate()
        try:
            process.wait(BOUND)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_it_answers(served: Served) -> None:
    end = time.monotonic() + BOUND
    with served.visit() as http:
        while served.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                http.get("/health")
                return
            time.sleep(0.02)  # another process's socket has no event to wait for
    raise RuntimeError(served.log.read_text())


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


def test_ids_come_back_in_the_headers(served: Served) -> None:
    with served.visit() as http:
        reply = http.get("/api/payments/none", headers={"x-correlation-id": "mine"})
    assert reply.status_code == 404
    assert reply.headers.get_list("x-correlation-id") == ["mine"]
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.headers["x-ratelimit-remaining"] == str(LIMIT - 1)


def test_a_keyed_payment_is_replayed_byte_by_byte(served: Served) -> None:
    headers = {"idempotency-key": "once"}
    with served.visit() as http:
        first = http.post("/api/payments", content=PAYMENT, headers=headers)
        # Chunked this time: what was asked for counts, not how it was cut.
        second = http.post("/api/payments", content=iter([PAYMENT[:9], PAYMENT[9:]]), headers=headers)
        other = http.post("/api/payments", content=PAYMENT.replace(b"100", b"101"), headers=headers)
    assert (first.status_code, second.status_code, other.status_code) == (201, 201, 422)
    assert first.content == second.content
    assert "x-idempotent-replayed" not in first.headers
    assert second.headers["x-idempotent-replayed"] == "true"
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["x-request-id"] != first.headers["x-request-id"]


def test_a_spent_quota_is_told_with_its_headers(served: Served) -> None:
    with served.visit() as http:
        spent = [http.get("/api/payments/none").status_code for _ in range(LIMIT)]
        refused = http.get("/api/payments/none")
        unlimited = http.get("/health/ready")
    assert spent == [404] * LIMIT
    assert refused.status_code == 429
    wait = int(refused.headers["retry-after"])
    assert 1 <= wait <= 60
    assert refused.json() == {"detail": "Too many requests", "retry_after": wait}
    assert refused.headers["x-ratelimit-limit"] == str(LIMIT)
    assert refused.headers["x-ratelimit-remaining"] == "0"
    assert 1 <= int(refused.headers["x-ratelimit-reset"]) <= 60
    assert refused.headers["x-request-id"].startswith("req_")
    assert unlimited.status_code == 200


def test_a_stream_is_handed_on_event_by_event(served: Served) -> None:
    with served.visit() as http, http.stream("GET", "/gated") as reply:
        lines = reply.iter_lines()
        assert next(lines) == "event: first"
        http.post("/gate").raise_for_status()
        assert [line for line in lines if line] == ["event: last"]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-request-id"].startswith("req_")
    assert "content-length" not in reply.headers


def test_health_answers_once_the_lifespan_has_begun(served: Served) -> None:
    with served.visit() as http:
        ready, head = http.get("/health/ready"), http.head("/health/ready")
    assert ready.status_code == head.status_code == 200
    assert ready.json()["status"] == "healthy"
    assert head.content == b""
    assert head.headers["content-length"] == str(len(ready.content))


def test_an_unhandled_error_carries_ids_and_no_reason(served: Served) -> None:
    with served.visit() as http:
        reply = http.get("/boom", headers={"x-correlation-id": "mine"})
    assert reply.status_code == 500
    assert reply.headers["x-correlation-id"] == "mine"
    assert reply.headers["x-request-id"].startswith("req_")
    assert "nobody handles this" not in reply.text


@pytest.mark.parametrize("name", SERVERS)
def test_sigterm_lets_a_stream_end_and_the_lifespan_with_it(name: str, tmp_path: Path) -> None:
    with serve(name, tmp_path) as running, running.visit() as http:
        with http.stream("GET", "/lasting") as reply:
            lines = reply.iter_lines()
            assert next(lines) == "event: first"
            running.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line] == ["event: last"]
        code = running.process.wait(BOUND)
    # uvicorn ends by the signal that it was sent.
    assert code in (0, -signal.SIGTERM)
    log = running.log.read_text()
    assert "The lifespan has ended." in log
    assert "Traceback" not in log
