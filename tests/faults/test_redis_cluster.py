"""A cluster that loses a node, moves slots while calls run, or can't be reached."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot

from resilience import Quota, ResilienceError, StoreUnavailableError
from resilience.decisions.idempotency import Claimed, Completed
from resilience.decisions.quota import Usage
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore
from tests.faults.redis_scene import (
    GRACE,
    LIMIT_TIMEOUT,
    RECORD_TIMEOUT,
    MakeStore,
    acquire,
    assert_outage_policies_hold,
    best_of_three,
    claim,
    heard,
    timed,
    until_answered,
)
from tests.support.redis_servers import RedisServer, binary, free_port, redis_cluster


def slot_of(store: RedisStore, subject: str) -> int:
    return key_slot(store._count_key("rule", subject, "S").encode())


def subjects_on(store: RedisStore, node: int, count: int) -> list[str]:
    """Return subjects whose counts are on one of the three nodes that a cluster starts with."""
    slots = range(16384 * node // 3, 16384 * (node + 1) // 3)
    names = (f"subject-{n}" for n in range(10_000))
    found = [name for name in names if slot_of(store, name) in slots]
    return found[:count]


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[list[RedisServer]]:
    async with redis_cluster(binary()) as servers:
        yield servers


@pytest_asyncio.fixture
async def doubled() -> AsyncIterator[list[RedisServer]]:
    async with redis_cluster(binary(), replicas=True) as servers:
        for replica in servers[3:]:
            async with Redis.from_url(replica.url) as client, asyncio.timeout(10):
                while (await client.info("replication")).get("master_link_status") != "up":  # noqa: ASYNC110 - as in until
                    await asyncio.sleep(0.02)
        yield servers


def url(server: RedisServer) -> str:
    return f"redis+cluster://127.0.0.1:{server.port}"


class TestUnreachable:
    async def test_no_call_waits_past_its_deadline_and_policies_hold(
        self, make_store: MakeStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def first(call: Callable[[RedisStore], Awaitable[Any]]) -> float:
            store = make_store(f"redis+cluster://127.0.0.1:{free_port()}")
            took, result = await timed(call(store))
            assert isinstance(result, StoreUnavailableError)
            return took

        assert await best_of_three(lambda: first(acquire)) <= LIMIT_TIMEOUT + GRACE
        assert await best_of_three(lambda: first(lambda store: claim(store, "k"))) <= RECORD_TIMEOUT + GRACE
        store = make_store(f"redis+cluster://127.0.0.1:{free_port()}")
        await assert_outage_policies_hold(store)
        caplog.clear()
        for _ in range(200):
            with pytest.raises(StoreUnavailableError):
                await acquire(store)
            await asyncio.sleep(0.005)
        assert heard(caplog, "can't be discovered") <= 1

    async def test_a_server_that_is_no_node_of_a_cluster_is_refused(
        self, make_store: MakeStore, server: RedisServer
    ) -> None:
        store = make_store(url(server))
        with pytest.raises(StoreUnavailableError):
            await acquire(store)
        await assert_outage_policies_hold(store)


@pytest.mark.slow
class TestKilledNode:
    @pytest.mark.parametrize("how", ["killed", "hung"])
    @pytest.mark.parametrize("node", [0, 1])  # 0 is the one that the store was told of
    async def test_its_slots_recover_on_its_replica_and_no_other_slot_ever_fails(
        self, how: str, node: int, make_store: MakeStore, doubled: list[RedisServer]
    ) -> None:
        store = make_store(url(doubled[0]))
        lost = subjects_on(store, node, 20)
        kept = [name for other in {0, 1, 2} - {node} for name in subjects_on(store, other, 20)]
        for name in lost + kept:
            await until_answered(store, name)
        if how == "killed":
            doubled[node].kill()
        else:
            doubled[node].signal(signal.SIGSTOP)
        waits: list[float] = []
        failed = 0
        async with asyncio.timeout(20):
            while True:
                answers = await asyncio.gather(*(timed(acquire(store, name)) for name in lost))
                others = await asyncio.gather(*(timed(acquire(store, name)) for name in kept))
                assert not [answer for _, answer in others if isinstance(answer, ResilienceError)]
                waits += [took for took, _ in answers + others]
                errors = [answer for _, answer in answers if isinstance(answer, ResilienceError)]
                failed += len(errors)
                if failed and not errors:
                    break
                await asyncio.sleep(0.02)
        for name in lost + kept:
            assert (await acquire(store, name)).allowed
        waits.sort()
        assert waits[len(waits) * 99 // 100] <= LIMIT_TIMEOUT + GRACE  # the machine may stall once in so many

    async def test_claims_of_its_slots_recover_and_stand(
        self, make_store: MakeStore, doubled: list[RedisServer]
    ) -> None:
        store = make_store(url(doubled[0]))
        keys = [f"{n:064x}" for n in range(60)]
        for key in keys:
            assert isinstance(await claim(store, key), Claimed)
            assert await store.complete(key, "mine", b"http:f", None, ttl=600)
        for server in doubled[:3]:
            async with Redis.from_url(server.url) as client:
                await client.wait(1, 1000)
        doubled[1].kill()
        async with asyncio.timeout(20):
            for key in keys:
                while isinstance((await timed(claim(store, key, "twin")))[1], StoreUnavailableError):  # noqa: ASYNC110 - as in until
                    await asyncio.sleep(0.05)
                assert isinstance(await claim(store, key, "twin"), Completed)


async def move(slot: int, source: RedisServer, target: RedisServer, others: list[RedisServer]) -> None:
    """Move a slot as an operator does, key by key, slowly enough for calls to come between."""
    async with Redis.from_url(source.url) as giver, Redis.from_url(target.url) as taker:
        ids = [(await client.execute_command("CLUSTER MYID")).decode() for client in (giver, taker)]  # type: ignore[no-untyped-call]
        await taker.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])  # type: ignore[no-untyped-call]
        await giver.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])  # type: ignore[no-untyped-call]
        await asyncio.sleep(0.05)
        while keys := await giver.execute_command("CLUSTER GETKEYSINSLOT", slot, 1):  # type: ignore[no-untyped-call]
            await giver.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 1000, "KEYS", *keys)  # type: ignore[no-untyped-call]
            await asyncio.sleep(0.05)
        for client in (taker, giver):
            await client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])  # type: ignore[no-untyped-call]
    for server in others:
        async with Redis.from_url(server.url) as client:
            await client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])  # type: ignore[no-untyped-call]


async def redirections(server: RedisServer) -> tuple[int, int]:
    """Return how often a node said MOVED, and ASK."""
    async with Redis.from_url(server.url) as client:
        stats: Any = await client.info("errorstats")
    return tuple(stats.get(f"errorstat_{name}", {}).get("count", 0) for name in ("MOVED", "ASK"))


@pytest.mark.slow
class TestMovedSlots:
    async def test_while_slots_move_under_traffic_nothing_fails_and_no_limit_is_passed(
        self, make_store: MakeStore, cluster: list[RedisServer]
    ) -> None:
        limit = Quota(400, per=3600)
        store, twin = (make_store(url(cluster[0]), limit_timeout=1, record_timeout=1) for _ in range(2))
        subjects = subjects_on(store, 0, 8)
        admitted = dict.fromkeys(subjects, 0)
        moving = True

        async def call(store: RedisStore, subject: str) -> None:
            wants = [Want("rule", subject, limit, 1), Want("other", subject, Quota(10_000, per=3600), 1)]
            while moving:
                usages = await store.acquire(wants)
                admitted[subject] += all(usage.allowed for usage in usages)
                await asyncio.sleep(0.002)

        calls = [asyncio.create_task(call(each, name)) for each in (store, twin) for name in subjects]
        try:
            for subject in subjects:
                await move(slot_of(store, subject), cluster[0], cluster[1], cluster[2:])
        finally:
            moving = False
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert [result for result in results if result is not None] == []
        moved, asked = await redirections(cluster[0])
        assert moved
        assert asked
        for subject in subjects:
            while True:
                usage: Usage = await acquire(store, subject, limit)
                if not usage.allowed:
                    break
                admitted[subject] += 1
        assert set(admitted.values()) == {400}

    async def test_claims_stay_single_while_their_slots_move(
        self, make_store: MakeStore, cluster: list[RedisServer]
    ) -> None:
        store = make_store(url(cluster[0]), record_timeout=1)
        keys = [key for n in range(200) if key_slot(store._record_key(key := f"{n:064x}").encode()) < 16384 // 3][:10]
        won: list[str] = []
        done = asyncio.Event()

        async def claims(token: str) -> None:
            while not done.is_set():
                for key in keys:
                    if isinstance(
                        await store.claim(key, token, b"http:f", lease=60, ttl=600, takeover="refuse"), Claimed
                    ):
                        won.append(f"{key} {token}")
                    await asyncio.sleep(0.001)

        calls = [asyncio.create_task(claims(f"token-{n}")) for n in range(4)]
        try:
            for key in keys:
                await move(key_slot(store._record_key(key).encode()), cluster[0], cluster[2], cluster[1:2])
        finally:
            done.set()
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert [result for result in results if result is not None] == []
        assert len(set(won)) == len(keys)  # each key has one owner, who may claim it again


@pytest.mark.slow
class TestClosed:
    async def test_a_closed_store_refuses_and_opens_nothing(
        self, make_store: MakeStore, cluster: list[RedisServer]
    ) -> None:
        store = make_store(url(cluster[0]))
        await until_answered(store)
        await store.aclose()
        with pytest.raises(StoreUnavailableError):
            await acquire(store)
        with pytest.raises(StoreUnavailableError):
            await claim(store, "k")

    async def test_closing_leaves_the_client_of_the_application_as_it_was(
        self, make_store: MakeStore, cluster: list[RedisServer]
    ) -> None:
        client = RedisCluster(host="127.0.0.1", port=cluster[0].port)
        await client.set("k", "v")
        node = client.get_node_from_key("k")
        assert node is not None
        store = make_store(client)
        await until_answered(store)
        connections = list(node._connections)
        await store.aclose()
        assert connections
        assert all(connection.is_connected for connection in connections)
        assert await client.get("k") == b"v"
        await client.aclose()
