"""A Redis that is refused, hung, killed, emptied, blocked, or no Redis: what callers wait for, see and find logged."""

import asyncio
import signal
from itertools import count
from typing import Any

import pytest
from redis.asyncio import Redis

from resilience import StoreUnavailableError
from resilience.decisions.idempotency import Claimed
from tests.faults.redis_scene import (
    GRACE,
    LIMIT_TIMEOUT,
    RECORD_TIMEOUT,
    RECOVERY,
    Babbler,
    MakeStore,
    Mute,
    Peer,
    Slammer,
    StartServer,
    Web,
    acquire,
    assert_dead_costs_nothing,
    assert_outage_policies_hold,
    assert_recovers_unasked,
    best_of_three,
    claim,
    heard,
    serving,
    timed,
    until,
)
from tests.support.redis_servers import RedisServer, free_port

# Holds the server up for as many seconds as it is told.
BUSY = """
local start, now = redis.call('TIME')
repeat now = redis.call('TIME') until now[1] - start[1] + (now[2] - start[2]) / 1000000 > tonumber(ARGV[1])
"""


async def first_acquire(make_store: MakeStore, url: str) -> float:
    took, result = await timed(acquire(make_store(url)))
    assert isinstance(result, StoreUnavailableError)
    return took


async def first_claim(make_store: MakeStore, url: str) -> float:
    took, result = await timed(claim(make_store(url), "k"))
    assert isinstance(result, StoreUnavailableError)
    return took


async def assert_never_waits_past_its_deadline(make_store: MakeStore, url: str) -> None:
    assert await best_of_three(lambda: first_acquire(make_store, url)) <= LIMIT_TIMEOUT + GRACE
    assert await best_of_three(lambda: first_claim(make_store, url)) <= RECORD_TIMEOUT + GRACE


class TestRefused:
    async def test_no_call_waits_past_its_deadline(self, make_store: MakeStore) -> None:
        await assert_never_waits_past_its_deadline(make_store, f"redis://127.0.0.1:{free_port()}")

    async def test_the_first_call_learns_at_once_what_is_wrong(self, make_store: MakeStore) -> None:
        port = free_port()
        source = Redis(host="127.0.0.1", port=port)  # retries by itself, with pauses, where it is used by itself
        store = make_store(source)
        took, result = await timed(claim(store, "k"))
        assert took < RECORD_TIMEOUT / 2
        assert "refused" in str(result)
        await source.aclose()

    async def test_known_to_be_gone_it_costs_nothing_and_policies_hold(
        self, make_store: MakeStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = make_store(f"redis://127.0.0.1:{free_port()}")
        with pytest.raises(StoreUnavailableError):
            await acquire(store)
        await assert_dead_costs_nothing(store)
        await assert_outage_policies_hold(store)
        assert heard(caplog, "is not available") == 1

    async def test_a_server_that_comes_later_is_found_unasked(
        self, make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        port = free_port()
        store = make_store(f"redis://127.0.0.1:{port}")
        with pytest.raises(StoreUnavailableError):
            await acquire(store)
        await start_server(port=port)
        await assert_recovers_unasked(store, caplog)


class TestHung:
    async def test_after_connecting_no_call_waits_past_its_deadline(
        self, make_store: MakeStore, server: RedisServer
    ) -> None:
        async def hang(record: bool) -> float:
            store = make_store(server.url)
            await acquire(store)
            server.signal(signal.SIGSTOP)
            calls = [claim(store, f"k{n}") if record else acquire(store, str(n)) for n in range(50)]
            answers = await asyncio.gather(*(timed(call) for call in calls))
            server.signal(signal.SIGCONT)
            assert {type(result) for _, result in answers} == {StoreUnavailableError}
            return max(took for took, _ in answers)

        assert await best_of_three(lambda: hang(record=False)) <= LIMIT_TIMEOUT + GRACE
        assert await best_of_three(lambda: hang(record=True)) <= RECORD_TIMEOUT + GRACE

    async def test_a_short_deadline_is_kept_beside_a_long_one(self, make_store: MakeStore, server: RedisServer) -> None:
        async def hang() -> float:
            store = make_store(server.url)
            await acquire(store)
            server.signal(signal.SIGSTOP)
            long = asyncio.create_task(timed(claim(store, "k")))
            await asyncio.sleep(0)
            took, result = await timed(acquire(store))
            server.signal(signal.SIGCONT)
            await long
            assert isinstance(result, StoreUnavailableError)
            return took

        assert await best_of_three(hang) <= LIMIT_TIMEOUT + GRACE

    async def test_before_connecting_no_call_waits_past_its_deadline(
        self, make_store: MakeStore, server: RedisServer
    ) -> None:
        server.signal(signal.SIGSTOP)
        await assert_never_waits_past_its_deadline(make_store, server.url)

    async def test_known_to_hang_it_costs_nothing_and_recovers_unasked(
        self, make_store: MakeStore, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = make_store(server.url)
        await acquire(store)
        server.signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailableError):
            await acquire(store)
        await assert_dead_costs_nothing(store)
        await assert_outage_policies_hold(store)
        server.signal(signal.SIGCONT)
        await assert_recovers_unasked(store, caplog)

    async def test_a_claim_of_many_steps_has_one_deadline(self, make_store: MakeStore, server: RedisServer) -> None:
        async def hang_in_the_middle() -> float:
            store = make_store(server.url)
            key = f"k{next(names)}"
            assert isinstance(await claim(store, key, "first"), Claimed)
            async with Redis.from_url(server.url) as other:
                await other.script_flush()
                blocking: asyncio.Future[Any] = asyncio.ensure_future(other.eval(BUSY, 0, "0.2"))
                await asyncio.sleep(0.02)  # not a synchronisation: whether it blocks by now is the machine's affair
                second = asyncio.create_task(timed(claim(store, key, "second")))
                await blocking
                await other.eval(BUSY, 0, "0.2")
                took, _ = await second
            return took

        names = count()
        assert await best_of_three(hang_in_the_middle) <= RECORD_TIMEOUT + GRACE


class TestKilled:
    async def test_in_the_middle_of_traffic_every_call_ends_in_time(
        self, make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def kill() -> float:
            server = await start_server()
            store = make_store(server.url)
            await acquire(store)
            calls = [asyncio.create_task(timed(acquire(store, str(n)))) for n in range(200)]
            await asyncio.sleep(0)  # what they sent is on its way
            server.kill()
            answers = await asyncio.gather(*calls)
            assert all(isinstance(result, StoreUnavailableError) or result.allowed for _, result in answers)
            with pytest.raises(StoreUnavailableError):
                await acquire(store)
            await store.aclose()
            return max(took for took, _ in answers)

        assert await best_of_three(kill) <= LIMIT_TIMEOUT + GRACE
        assert heard(caplog, "is not available") == 3

    async def test_its_successor_on_the_same_port_is_found_unasked(
        self, make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = await start_server()
        store = make_store(server.url)
        for _ in range(3):
            usage = await acquire(store)
        server.kill()
        await until(lambda: heard(caplog, "is not available") == 1, within=1)  # the close itself tells
        await assert_dead_costs_nothing(store)
        await start_server(port=server.port)
        await assert_recovers_unasked(store, caplog)
        assert (await acquire(store)).remaining > usage.remaining  # it began empty

    async def test_policies_hold_from_the_first_call_on(self, make_store: MakeStore, server: RedisServer) -> None:
        store = make_store(server.url)
        await acquire(store)
        server.kill()
        await assert_outage_policies_hold(store)


@pytest.mark.parametrize("version", ["7.0", "6.2"])
async def test_scripts_that_the_server_forgot_are_sent_again(
    version: str, make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start_server(version=version)
    store = make_store(server.url)
    await acquire(store)
    assert isinstance(await claim(store, "k"), Claimed)
    async with Redis.from_url(server.url) as other:
        await other.script_flush()
        assert (await acquire(store)).remaining == QUOTA_LEFT
        await other.script_flush()
        assert await store.renew("k", "mine", lease=30, ttl=60)
        await other.script_flush()
        assert await store.complete("k", "mine", b"http:f", None, ttl=60)
        await other.script_flush()
        assert not await store.release("k", "mine")
    assert not caplog.records


QUOTA_LEFT = 1_000_000 - 2


async def test_a_slow_script_of_somebody_else_delays_no_call_past_its_deadline(
    make_store: MakeStore, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def block() -> float:
        caplog.clear()
        store = make_store(server.url)
        await acquire(store)
        async with Redis.from_url(server.url) as other:
            blocking: asyncio.Future[Any] = asyncio.ensure_future(other.eval(BUSY, 0, "0.3"))
            slowest = 0.0
            while not blocking.done():
                took, _ = await timed(acquire(store))
                slowest = max(slowest, took)
                await asyncio.sleep(0.001)
            await blocking
        await assert_recovers_unasked(store, caplog)
        return slowest

    slowest = await best_of_three(block)
    assert LIMIT_TIMEOUT <= slowest <= LIMIT_TIMEOUT + GRACE


@pytest.mark.parametrize("kind", [Mute, Slammer, Web, Babbler])
class TestNoRedis:
    async def test_no_call_waits_past_its_deadline(self, kind: type[Peer], make_store: MakeStore) -> None:
        async with serving(kind) as (url, _):
            await assert_never_waits_past_its_deadline(make_store, url)

    async def test_policies_hold(self, kind: type[Peer], make_store: MakeStore) -> None:
        async with serving(kind) as (url, _):
            await assert_outage_policies_hold(make_store(url))

    async def test_it_is_knocked_at_ever_more_slowly_however_many_call(
        self, kind: type[Peer], make_store: MakeStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving(kind) as (url, peers):
            store = make_store(url)
            loop = asyncio.get_running_loop()
            start = loop.time()
            while loop.time() - start < RECOVERY / 3:
                with pytest.raises(StoreUnavailableError):
                    await acquire(store)
                await asyncio.sleep(0)
            assert len(peers) <= 8
            assert heard(caplog, "is not available") <= 8


async def test_a_command_that_had_little_time_left_fails_alone(
    make_store: MakeStore, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(server.url, limit_timeout=1)
    await acquire(store)
    link: Any = store._nodes._link  # type: ignore[attr-defined]
    server.signal(signal.SIGSTOP)
    with pytest.raises(StoreUnavailableError):
        await link.send(("PING",), 0.001)
    server.signal(signal.SIGCONT)
    assert (await acquire(store)).allowed
    assert not caplog.records
