"""A check of any database. Knows drivers by what their objects can do, and imports none."""

import asyncio
from collections.abc import Callable
from inspect import isawaitable, iscoroutinefunction
from types import AsyncGeneratorType, GeneratorType
from typing import Any

from resilience.checks.checked import Unmet, checked
from resilience.decisions.readiness import ComponentHealth
from resilience.errors import ConfigurationError
from resilience.threads import in_thread

_QUERY = "SELECT 1"
_REMEDY = (
    "Pass the application's own engine, session factory, pool or connection, or a function that asks the database: "
    "a check that connected by itself would use up connections, and tell nothing about those that the service has."
)


async def check_database(db: Any, *, timeout: float = 5.0) -> ComponentHealth:  # noqa: ASYNC109 - sync drivers have none
    """Have a database answer ``SELECT 1``, on a connection that goes back to where it came from.

    A transaction that runs is left as it is, and none is left behind. Prefer the engine or the pool: a lone connection
    or session is often busy, and some drivers refuse a second query then.

    Args:
        db: an engine, session factory, session or connection of SQLAlchemy, sync or async; a pool or connection of
            asyncpg, psycopg, aiosqlite or aiomysql; a connection of ``sqlite3``, made with ``check_same_thread=False``,
            or of another DB-API driver; whatever has ``ping()`` or ``execute("SELECT 1")``; or a function, sync or
            async, that asks, and raises or returns False where there is no answer. What is sync is asked in a thread.
        timeout: seconds, > 0, until it drops a connection that does not answer. What is sync keeps its thread until its
            driver gives up: set the driver's own timeouts.

    Raises:
        ConfigurationError: ``db`` is a URL, or nothing that can be asked.
    """
    if db is None or isinstance(db, str | bytes):
        raise ConfigurationError(f"A URL or nothing at all can't be checked. {_REMEDY}")
    modules = {base.__module__ for base in db.__class__.__mro__}
    families = {module.partition(".")[0] for module in modules}

    async def ask() -> None:
        if "sqlalchemy" in families and any(module.startswith("sqlalchemy.ext.asyncio") for module in modules):
            async with asyncio.timeout(timeout):
                await _ask_async_sqlalchemy(db)
        elif "sqlalchemy" in families:
            await in_thread(lambda: _ask_sqlalchemy(db))
        elif _is_async(db):
            async with asyncio.timeout(timeout):
                # Without a bound of its own, asyncpg's pool waits for ever to have a dropped query confirmed.
                await _ask_async(db, {"timeout": timeout} if "asyncpg" in families else {})
        else:
            rest = await in_thread(lambda: _ask(db))
            if rest is not None:
                async with asyncio.timeout(timeout):
                    await rest

    return await checked("database", ask)


# -- SQLAlchemy


def _opened(db: Any) -> Any:
    """Return what is to be closed after the question; None where ``db`` is open already."""
    if hasattr(db, "session_factory"):  # of a scoped session: one that belongs to no scope
        return db.session_factory()
    if callable(db):
        return db()
    if hasattr(db, "connect"):
        return db.connect()
    if not hasattr(db, "execute"):
        raise ConfigurationError(f"A {db.__class__.__name__} can't be checked. {_REMEDY}")
    return None


async def _ask_async_sqlalchemy(db: Any) -> None:
    from sqlalchemy import select  # noqa: PLC0415 - only who passes what is SQLAlchemy's has it

    opened = _opened(db)
    if opened is not None:
        async with opened as connection:
            await connection.execute(select(1))
        return
    idle = not db.in_transaction()
    try:
        await db.execute(select(1))
    finally:
        if idle:
            await db.rollback()


def _ask_sqlalchemy(db: Any) -> None:
    from sqlalchemy import select  # noqa: PLC0415 - as above

    opened = _opened(db)
    if opened is not None:
        with opened as connection:
            connection.execute(select(1))
        return
    idle = not db.in_transaction()
    try:
        db.execute(select(1))
    finally:
        if idle:
            db.rollback()


# -- everything else


def _method(db: Any, *names: str) -> Callable[..., Any] | None:
    for name in names:
        method = getattr(db, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None


_LENDS = ("acquire", "connection")  # The methods of pools that lend a connection for the length of a ``with``.


def _is_async(db: Any) -> bool:
    if hasattr(db, "__aenter__") and not hasattr(db, "__enter__"):
        return True
    method = _method(db, *_LENDS) or _method(db, "ping", "execute") or getattr(db, "__call__", None)  # noqa: B004 - for its style
    return iscoroutinefunction(db) or iscoroutinefunction(method)


async def _ask_async(db: Any, bound: dict[str, float]) -> None:
    lend = _method(db, *_LENDS)
    if lend is not None:
        await _ask_lent(lend(**bound))
        return
    idle = _is_idle(db)
    await _conclude(_question(db))
    if idle:
        await db.rollback()


def _ask(db: Any) -> Any:
    """Ask in a thread. Return what the loop is to await; None where all is done."""
    lend = _method(db, *_LENDS)
    if lend is not None:
        lent = lend()
        if _is_awaited(lent):
            return _ask_lent(lent)
        with lent as connection:
            _close(_judge(_question(connection)))
        return None
    idle = _is_idle(db)
    answer = _question(db)
    if isawaitable(answer):
        return _conclude(answer)
    _close(_judge(answer))
    if idle:
        db.rollback()
    return None


async def _ask_lent(lent: Any) -> None:
    async with lent if hasattr(lent, "__aenter__") else await lent as connection:
        await _conclude(_question(connection))


def _is_awaited(answer: Any) -> bool:
    return isawaitable(answer) or hasattr(answer, "__aenter__")


def _question(db: Any) -> Any:
    if ping := _method(db, "ping"):
        return ping()
    if execute := _method(db, "execute"):
        return execute(_QUERY)
    if make_cursor := _method(db, "cursor"):
        cursor = make_cursor()
        cursor.execute(_QUERY)
        return cursor
    if callable(db):
        return db()
    raise ConfigurationError(f"A {db.__class__.__name__} can't be checked. {_REMEDY}")


async def _conclude(answer: Any) -> None:
    closing = _close(_judge(await answer if isawaitable(answer) else answer))
    if isawaitable(closing):
        await closing


def _judge(answer: Any) -> Any:
    if answer is False:
        raise Unmet("No answer")
    if isinstance(answer, GeneratorType | AsyncGeneratorType):
        # A dependency of FastAPI's: nothing of it has run, so nothing was asked.
        raise ConfigurationError(f"A function that yields can't be checked. {_REMEDY}")
    return answer


def _close(answer: Any) -> Any:
    """Close ``answer`` if it is a cursor: one that is left open holds its connection, or a lock."""
    return answer.close() if hasattr(answer, "fetchone") else None


def _is_idle(db: Any) -> bool:
    """Tell whether ``db`` is a connection of psycopg's outside of a transaction: the question begins one there."""
    return getattr(getattr(db, "info", None), "transaction_status", None) == 0
