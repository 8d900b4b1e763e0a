"""Databases, for real: every way that an application holds one, while its server is up, stopped, killed and back."""

import asyncio
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import asyncpg  # type: ignore[import-untyped] # it ships none
import psycopg
import psycopg_pool
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from resilience.checks import check_database
from resilience.decisions.readiness import HealthStatus
from resilience.health import HealthChecker
from tests.support.postgres_server import PostgresServer, folder

Holding = Callable[[PostgresServer], AbstractAsyncContextManager[Any]]

HEALTHY, UNHEALTHY = HealthStatus.HEALTHY, HealthStatus.UNHEALTHY


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer(folder()) as server:
        yield server


@asynccontextmanager
async def async_engine(server: PostgresServer, driver: str = "asyncpg") -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"postgresql+{driver}://{server.address}", pool_size=1, max_overflow=0)
    try:
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def async_engine_on_psycopg(server: PostgresServer) -> AsyncIterator[AsyncEngine]:
    async with async_engine(server, "psycopg") as engine:
        yield engine


@asynccontextmanager
async def async_factory(server: PostgresServer) -> AsyncIterator[Any]:
    async with async_engine(server) as engine:
        yield async_sessionmaker(engine)


@asynccontextmanager
async def async_scoped(server: PostgresServer) -> AsyncIterator[Any]:
    async with async_engine(server) as engine:
        yield async_scoped_session(async_sessionmaker(engine), asyncio.current_task)


@asynccontextmanager
async def async_session(server: PostgresServer) -> AsyncIterator[AsyncSession]:
    async with async_engine(server) as engine, AsyncSession(engine) as session:
        yield session


@asynccontextmanager
async def async_connection(server: PostgresServer) -> AsyncIterator[Any]:
    async with async_engine(server) as engine, engine.connect() as connection:
        yield connection


@asynccontextmanager
async def engine(server: PostgresServer) -> AsyncIterator[Any]:
    made = create_engine(f"postgresql+psycopg://{server.address}", pool_size=1, max_overflow=0)
    try:
        yield made
    finally:
        made.dispose()


@asynccontextmanager
async def factory(server: PostgresServer) -> AsyncIterator[Any]:
    async with engine(server) as made:
        yield sessionmaker(made)


@asynccontextmanager
async def scoped(server: PostgresServer) -> AsyncIterator[Any]:
    async with engine(server) as made:
        yield scoped_session(sessionmaker(made))


@asynccontextmanager
async def session(server: PostgresServer) -> AsyncIterator[Session]:
    async with engine(server) as made:
        with Session(made) as session:
            yield session


@asynccontextmanager
async def asyncpg_pool(server: PostgresServer) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(f"postgresql://{server.address}", min_size=0, max_size=1) as pool:
        try:
            yield pool
        finally:
            pool.terminate()


@asynccontextmanager
async def asyncpg_connection(server: PostgresServer) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(f"postgresql://{server.address}")
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def psycopg_async_pool(server: PostgresServer) -> AsyncIterator[Any]:
    async with psycopg_pool.AsyncConnectionPool(
        f"postgresql://{server.address}", min_size=0, max_size=1, open=False
    ) as pool:
        yield pool


@asynccontextmanager
async def psycopg_pool_sync(server: PostgresServer) -> AsyncIterator[Any]:
    with psycopg_pool.ConnectionPool(f"postgresql://{server.address}", min_size=0, max_size=1, open=False) as pool:
        yield pool


@asynccontextmanager
async def psycopg_async_connection(server: PostgresServer) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(f"postgresql://{server.address}") as connection:
        yield connection


@asynccontextmanager
async def psycopg_connection(server: PostgresServer) -> AsyncIterator[Any]:
    with psycopg.connect(f"postgresql://{server.address}") as connection:
        yield connection


POOLS = [async_engine, async_engine_on_psycopg, async_factory, async_scoped, asyncpg_pool, psycopg_async_pool]
SYNC_POOLS = [engine, factory, scoped, psycopg_pool_sync]
LONE = [
    async_session,
    async_connection,
    session,
    asyncpg_connection,
    psycopg_async_connection,
    psycopg_connection,
]


@pytest.mark.parametrize("holding", [*POOLS, *SYNC_POOLS, *LONE], ids=lambda holding: holding.__name__)
async def test_a_postgres_that_is_up_is_healthy_however_it_is_held(holding: Holding, postgres: PostgresServer) -> None:
    async with holding(postgres) as db:
        for _ in range(3):  # more often than a pool of one has connections
            found = await check_database(db)
            assert (found.status, found.message) == (HEALTHY, "Connected")


@pytest.mark.parametrize("holding", LONE, ids=lambda holding: holding.__name__)
async def test_no_transaction_is_left_behind(holding: Holding, postgres: PostgresServer) -> None:
    query = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    async with holding(postgres) as db, asyncpg_connection(postgres) as other:
        assert (await check_database(db)).status is HEALTHY
        assert await other.fetchval(query) == 0


@pytest.mark.parametrize("holding", [async_session, async_connection], ids=lambda holding: holding.__name__)
async def test_a_transaction_that_runs_is_left_as_it_is(holding: Holding, postgres: PostgresServer) -> None:
    async with holding(postgres) as db:
        await db.execute(text("CREATE TEMPORARY TABLE mine (n int) ON COMMIT DROP"))
        assert (await check_database(db)).status is HEALTHY
        await db.execute(text("SELECT n FROM mine"))


@pytest.mark.parametrize("holding", POOLS, ids=lambda holding: holding.__name__)
async def test_a_postgres_that_hangs_is_unhealthy_in_time_and_healthy_again_when_it_goes_on(
    holding: Holding, postgres: PostgresServer
) -> None:
    async with holding(postgres) as db:
        checker = HealthChecker(timeout=0.2, ttl=0.0)
        checker.add_check("orders", lambda: check_database(db, timeout=0.5))
        assert (await checker.run()).status is HEALTHY
        postgres.signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                report = await checker.run()
        finally:
            postgres.signal(signal.SIGCONT)
        assert (report.status, report.components["orders"].message) == (UNHEALTHY, "Timed out")
        await until_healthy(checker)


@pytest.mark.slow
@pytest.mark.parametrize("holding", [*POOLS, *SYNC_POOLS], ids=lambda holding: holding.__name__)
async def test_a_postgres_that_was_killed_is_unhealthy_by_a_class_and_healthy_when_it_is_back(
    holding: Holding, postgres: PostgresServer
) -> None:
    async with holding(postgres) as db:
        checker = HealthChecker(timeout=3.0, ttl=0.0)
        checker.add_check("orders", lambda: check_database(db, timeout=1.0))
        assert (await checker.run()).status is HEALTHY
        postgres.kill()
        try:
            report = await checker.run()
        finally:
            postgres.start()
        message = report.components["orders"].message or ""
        assert report.status is UNHEALTHY
        assert message == "Timed out" or message.isidentifier()
        await until_healthy(checker)


@pytest.mark.slow
@pytest.mark.parametrize(
    "holding", [async_engine, asyncpg_pool, psycopg_async_pool], ids=lambda holding: holding.__name__
)
async def test_a_check_drops_a_connection_that_does_not_answer_while_the_server_still_hangs(
    holding: Holding, postgres: PostgresServer
) -> None:
    async with holding(postgres) as db:
        assert (await check_database(db)).status is HEALTHY
        postgres.signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):  # psycopg waits for its cancellation twice, 5 s each
                found = await check_database(db, timeout=0.2)
        finally:
            postgres.signal(signal.SIGCONT)
        assert (found.status, found.message) == (UNHEALTHY, "Timed out")
        assert (await check_database(db)).status is HEALTHY


async def until_healthy(checker: HealthChecker) -> None:
    async with asyncio.timeout(10):
        while (await checker.run()).status is not HEALTHY:  # noqa: ASYNC110 - no server tells that it is back
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("holding", [async_engine, async_factory, asyncpg_pool], ids=lambda holding: holding.__name__)
async def test_a_cancelled_check_leaves_the_pool_whole(holding: Holding, postgres: PostgresServer) -> None:
    async with holding(postgres) as db:
        await check_database(db)
        for turns in range(12):  # each time a bit further on its way
            check = asyncio.ensure_future(check_database(db))
            for _ in range(turns):
                await asyncio.sleep(0)
            check.cancel()
            await asyncio.wait({check})
        assert (await check_database(db)).status is HEALTHY


async def test_sqlite_is_asked_through_each_driver(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    lone = sqlite3.connect(path, check_same_thread=False)
    sync, own = create_engine(f"sqlite:///{path}"), create_async_engine(f"sqlite+aiosqlite:///{path}")
    async with aiosqlite.connect(path) as connection, AsyncSession(own) as session:
        factories = sessionmaker(sync), scoped_session(sessionmaker(sync)), async_sessionmaker(own)
        for db in (connection, lone, sync, own, *factories, session, Session(sync)):
            found = await check_database(db)
            assert (found.status, found.message) == (HEALTHY, "Connected"), db
    lone.close()
    sync.dispose()
    await own.dispose()
    for closed in (connection, lone):
        assert (await check_database(closed)).status is UNHEALTHY


async def test_sqlite_whose_file_can_t_be_opened_is_unhealthy_and_its_path_stays_inside(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/nowhere/app.db")
    found = await check_database(engine)
    engine.dispose()
    assert (found.status, found.message) == (UNHEALTHY, "OperationalError")
