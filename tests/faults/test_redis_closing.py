"""A store that is closed in the middle of things: who waits is told, and nothing stays open."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from resilience import ResilienceError, StoreUnavailableError
from resilience.stores.redis import RedisStore
from tests.faults.redis_scene import MakeStore, Mute, acquire, claim, serving, timed
from tests.support.redis_servers import RedisServer, free_port

CALLS = pytest.mark.parametrize("call", [acquire, lambda store: claim(store, "k")], ids=["acquire", "claim"])
Ask = Callable[[RedisStore], Awaitable[Any]]


async def assert_told_at_once(store: RedisStore, call: Ask) -> None:
    waiting = [asyncio.create_task(timed(call(store))) for _ in range(10)]
    await asyncio.sleep(0.01)  # they wait by now, or will when the store is closed: either is told
    took, _ = await timed(store.aclose())
    assert took < 0.5
    async with asyncio.timeout(0.5):
        for _, result in await asyncio.gather(*waiting):
            assert isinstance(result, StoreUnavailableError)


@CALLS
async def test_closed_while_the_server_hangs_callers_are_told_at_once(
    call: Ask, make_store: MakeStore, server: RedisServer
) -> None:
    store = make_store(server.url, limit_timeout=5, record_timeout=5)
    await acquire(store)
    server.signal(signal.SIGSTOP)
    await assert_told_at_once(store, call)


@CALLS
@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_closed_before_the_first_answer_callers_are_told_at_once(
    call: Ask, scheme: str, make_store: MakeStore
) -> None:
    async with serving(Mute) as (url, _):
        store = make_store(url.replace("redis", scheme, 1), limit_timeout=5, record_timeout=5)
        await assert_told_at_once(store, call)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_closed_while_the_server_is_gone_it_knocks_no_more(
    scheme: str, make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(f"{scheme}://127.0.0.1:{free_port()}")
    with pytest.raises(StoreUnavailableError):
        await acquire(store)
    await store.aclose()
    caplog.clear()
    await asyncio.sleep(0.2)
    assert not caplog.records


async def test_a_closed_store_refuses_every_call(make_store: MakeStore, server: RedisServer) -> None:
    store = make_store(server.url)
    await acquire(store)
    await store.aclose()
    await store.aclose()
    for call in (
        acquire(store),
        claim(store, "k"),
        store.renew("k", "mine", lease=1, ttl=1),
        store.complete("k", "mine", b"http:f", None, ttl=1),
        store.release("k", "mine"),
        store.reset("rule", "anyone"),
    ):
        with pytest.raises(StoreUnavailableError, match="closed"):
            await call


async def test_a_store_that_was_never_used_closes(make_store: MakeStore) -> None:
    await make_store("redis://127.0.0.1").aclose()


async def test_callers_who_are_cancelled_leave_nothing_behind(make_store: MakeStore, server: RedisServer) -> None:
    store = make_store(server.url)
    for wait in (0.0, 0.0001, 0.001):
        calls: list[Awaitable[Any]] = [acquire(store, str(n)) for n in range(50)]
        calls += [claim(store, f"{n:064x}") for n in range(50)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(wait)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [result for result in results if isinstance(result, ResilienceError)]
    assert (await acquire(store)).allowed


async def test_what_a_link_remembers_of_deadlines_is_bounded(make_store: MakeStore, server: RedisServer) -> None:
    store = make_store(server.url)
    await acquire(store)
    link: Any = store._nodes._link  # type: ignore[attr-defined]
    for n in range(1000):
        await link.send(("PING",), 0.05 - n * 0.00001)
    assert len(link._wire._deadlines) <= 50
