"""Checks of what services depend on: told by what they find, and by nothing that a driver says."""

import logging
import sqlite3
from typing import Any

import pytest

from resilience.checks import check_database, check_redis
from resilience.decisions.readiness import HealthStatus
from resilience.health import ComponentHealth, HealthChecker
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


@pytest.mark.parametrize(("db", "message"), [(Refusing(), "ConnectionRefusedError"), (object(), "AttributeError")])
async def test_a_database_that_fails_is_unhealthy_by_the_class_of_its_error(
    db: object, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    found = await check_database(db)

    assert (found.status, found.message) == (HealthStatus.UNHEALTHY, message)
    assert message in caplog.text
    assert SECRET not in caplog.text


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
