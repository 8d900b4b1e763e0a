"""Checks of what services depend on: told by what they find, and by nothing that a driver says."""

import asyncio
import logging
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from resilience.checks import check_database, check_disk, check_http, check_redis, check_store, check_tcp
from resilience.decisions.readiness import HealthStatus
from resilience.errors import ConfigurationError
from resilience.health import ComponentHealth, HealthChecker
from resilience.stores.memory import MemoryStore
from resilience.testing import FaultyStore
from tests.support.redis_servers import free_port

SECRET = "pa55"


class Awaited:
    """A database whose methods are coroutines, or return an awaitable."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def execute(self, query: str) -> None:
        self.asked.append(query)


class Pinged(Awaited):
    async def ping(self) -> None:
        self.asked.append("ping")


class Returned(Awaited):
    def ping(self) -> Any:
        return self.execute("ping")


class Refusing:
    def execute(self, _query: str) -> None:
        raise ConnectionRefusedError(f"postgres://app:{SECRET}@db/orders")


def is_healthy(found: ComponentHealth, name: str) -> bool:
    assert found.latency_ms is not None
    assert found.latency_ms >= 0
    return (found.name, found.status, found.message) == (name, HealthStatus.HEALTHY, "Connected")


@pytest.mark.parametrize(("db", "asked"), [(Awaited(), "SELECT 1"), (Pinged(), "ping"), (Returned(), "ping")])
async def test_a_database_is_asked_by_the_least_it_can_answer(db: Awaited, asked: str) -> None:
    assert is_healthy(await check_database(db), "database")
    assert db.asked == [asked]


async def test_a_database_of_plain_methods_is_asked_in_a_thread() -> None:
    db = sqlite3.connect(":memory:", check_same_thread=False)

    assert is_healthy(await check_database(db), "database")

    db.close()
    assert (await check_database(db)).message == "ProgrammingError"


async def test_a_database_that_fails_is_unhealthy_by_the_class_of_its_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    found = await check_database(Refusing())

    assert (found.status, found.message) == (HealthStatus.UNHEALTHY, "ConnectionRefusedError")
    assert "ConnectionRefusedError" in caplog.text
    assert SECRET not in caplog.text


def get_session() -> Iterator[None]:
    yield


@pytest.mark.parametrize("db", [f"postgresql://app:{SECRET}@db/orders", b"sqlite://", None, object(), get_session])
async def test_what_is_no_database_is_refused_with_the_remedy_and_without_the_url(db: Any) -> None:
    with pytest.raises(ConfigurationError, match="Pass the application's own engine") as refused:
        await check_database(db)
    assert SECRET not in str(refused.value)


class Lent(Awaited):
    """A pool of one, whose connection is out for the length of a with."""

    out = 0

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Awaited]:
        self.out += 1
        try:
            yield self
        finally:
            self.out -= 1


class Endless(Lent):
    async def execute(self, query: str) -> None:
        await super().execute(query)
        await asyncio.Event().wait()


async def test_a_connection_goes_back_to_its_pool_when_it_was_asked_or_dropped() -> None:
    pool, hung = Lent(), Endless()

    assert is_healthy(await check_database(pool), "database")
    assert (await check_database(hung, timeout=0.01)).message == "Timed out"

    assert (pool.asked, hung.asked) == (["SELECT 1"], ["SELECT 1"])
    assert (pool.out, hung.out) == (0, 0)


async def test_a_function_is_a_check_of_a_database_and_false_is_no_answer() -> None:
    async def answers() -> bool:
        return True

    assert is_healthy(await check_database(answers), "database")
    assert is_healthy(await check_database(lambda: "anything"), "database")
    assert (await check_database(lambda: False)).message == "No answer"


class Cursorless:
    """A driver that only has what DB-API says."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self.cursors: list[sqlite3.Cursor] = []

    def cursor(self) -> sqlite3.Cursor:
        self.cursors.append(self._db.cursor())
        return self.cursors[-1]

    def end(self) -> None:
        self._db.close()


async def test_a_plain_db_api_connection_is_asked_through_a_cursor_that_is_closed_again() -> None:
    db = Cursorless()

    assert is_healthy(await check_database(db), "database")

    with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
        db.cursors[0].fetchone()
    db.end()


async def test_a_plain_driver_that_hangs_blocks_neither_the_loop_nor_another_check() -> None:
    free = threading.Event()
    checker = HealthChecker(timeout=0.05, ttl=0)
    for number in range(8):  # more than any pool of threads for checks has
        checker.add_check(f"hung{number}", lambda: check_database(free.wait))
    checker.add_check("fine", lambda: check_database(lambda: True))

    report = await checker.run()
    free.set()

    assert report.components["fine"].status is HealthStatus.HEALTHY
    assert report.components["hung0"].message == "Timed out"


def test_a_plain_driver_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    program = (
        "import asyncio, threading\n"
        "from resilience import HealthChecker, check_database\n"
        "checker = HealthChecker(timeout=0.05)\n"
        "checker.add_check('db', lambda: check_database(threading.Event().wait))\n"
        "print(asyncio.run(checker.run()).components['db'].message)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert ended.stdout.strip() == "Timed out"


def test_the_core_imports_no_driver_to_check_one() -> None:
    program = "import sys, resilience; print({'sqlalchemy', 'httpx', 'redis', 'asyncpg'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert ended.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "url", [f"redis://:{SECRET}@127.0.0.1:{{port}}", f"redis://:{SECRET}/x@127.0.0.1", f"no:{SECRET}"]
)
async def test_a_redis_that_does_not_answer_is_unhealthy_and_its_url_stays_secret(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    found = await check_redis(url.format(port=free_port()))

    assert (found.name, found.status) == ("redis", HealthStatus.UNHEALTHY)
    assert found.message in ("ConnectionError", "ValueError")
    assert SECRET not in caplog.text


async def test_a_failed_check_makes_the_service_unready() -> None:
    checker = HealthChecker()
    checker.add_check("orders", lambda: check_database(Refusing()))

    report = await checker.run()

    assert report.status is HealthStatus.UNHEALTHY
    assert report.to_dict()["components"]["orders"]["message"] == "ConnectionRefusedError"


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port that accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_a_redis_that_accepts_and_never_answers_is_given_up_in_time(deaf: int) -> None:
    async with asyncio.timeout(5):
        found = await check_redis(f"redis://127.0.0.1:{deaf}", timeout=0.05)
    assert (found.status, found.message) == (HealthStatus.UNHEALTHY, "Timed out")


async def test_a_store_is_looked_at_and_nothing_is_counted() -> None:
    store = MemoryStore()

    assert is_healthy(await check_store(store), "store")
    assert is_healthy(await check_store(store), "store")

    faulty = FaultyStore(store)
    faulty.down = True
    found = await check_store(faulty)
    assert (found.status, found.message) == (HealthStatus.UNHEALTHY, "StoreUnavailableError")


@pytest.mark.parametrize("min_free", [0, 0.0, 1, 1e-9])
async def test_a_disk_with_enough_space_is_healthy(tmp_path: Path, min_free: float) -> None:
    found = await check_disk(tmp_path, min_free)

    assert (found.status, found.message) == (HealthStatus.HEALTHY, "Enough space")
    assert found.details is not None
    assert found.details["total_bytes"] == shutil.disk_usage(tmp_path).total


@pytest.mark.parametrize("min_free", [2**63, 0.9999999])
async def test_a_disk_without_enough_space_is_unhealthy(tmp_path: Path, min_free: float) -> None:
    found = await check_disk(tmp_path, min_free)

    assert (found.status, found.message) == (HealthStatus.UNHEALTHY, "Too little space")
    assert found.details is not None
    assert set(found.details) == {"free_bytes", "total_bytes"}


async def test_a_disk_that_is_not_there_is_unhealthy_and_its_path_stays_inside(tmp_path: Path) -> None:
    assert (await check_disk(tmp_path / "gone")).message == "FileNotFoundError"


@pytest.mark.parametrize("min_free", [-1, -0.1, float("nan")])
async def test_a_bound_of_free_space_that_can_t_be_is_refused(tmp_path: Path, min_free: float) -> None:
    with pytest.raises(ConfigurationError):
        await check_disk(tmp_path, min_free)


async def test_a_port_is_healthy_while_something_listens(deaf: int) -> None:
    assert is_healthy(await check_tcp("127.0.0.1", deaf), "tcp")
    assert (await check_tcp("127.0.0.1", free_port())).message == "ConnectionRefusedError"


@asynccontextmanager
async def answering(status: int, body: bytes) -> AsyncIterator[str]:
    """Serve one answer, the beginning of a long one, to all that ask; yield the URL."""
    served: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\nLocation: /elsewhere\r\nContent-Length: 1000000000\r\n\r\n" % status)
        writer.write(body)
        await asyncio.wait({asyncio.ensure_future(reader.read())})  # until the client hangs up
        writer.transport.abort()

    def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.ensure_future(serve(reader, writer)))

    async with await asyncio.start_server(meet, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*served, return_exceptions=True)


@pytest.mark.parametrize(
    ("status", "message"), [(200, "Connected"), (204, "Connected"), (302, "Answered 302"), (503, "Answered 503")]
)
async def test_a_page_is_healthy_by_its_status_however_long_it_is(status: int, message: str) -> None:
    body = b"" if status == 204 else b"x" * 100_000
    async with answering(status, body) as url, httpx.AsyncClient() as client:
        found = await check_http(client, f"{url}/health?key={SECRET}", timeout=5)
    assert (found.name, found.message) == ("http", message)
    assert (found.status is HealthStatus.HEALTHY) == (status < 300)


async def test_a_page_that_does_not_come_is_unhealthy_by_a_class(deaf: int) -> None:
    async with httpx.AsyncClient() as client:
        assert (await check_http(client, f"http://127.0.0.1:{deaf}/", timeout=0.05)).message == "Timed out"
        assert (await check_http(client, f"http://u:{SECRET}@127.0.0.1:{free_port()}/")).message == "ConnectError"
        assert (await check_http(client, f"no:{SECRET}")).message == "UnsupportedProtocol"


@pytest.mark.parametrize("client", ["http://127.0.0.1/", None, object()])
async def test_what_is_no_http_client_is_refused(client: Any) -> None:
    with pytest.raises(ConfigurationError, match="httpx"):
        await check_http(client, "/health")
