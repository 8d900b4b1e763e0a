"""A primary that is replaced, and a server that is a replica by now, or from the start."""

import asyncio

import pytest
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel as SentinelClient

from resilience import ResilienceError, StoreUnavailableError
from resilience.decisions.idempotency import Claimed
from tests.faults.redis_scene import (
    MakeStore,
    StartServer,
    acquire,
    assert_outage_policies_hold,
    assert_recovers_unasked,
    claim,
    heard,
    until_answered,
)
from tests.support.redis_servers import RedisServer, Sentinel, binary

PROMPT = ("--repl-diskless-sync-delay", "0")  # A replica need not wait for others to come.
VERSIONS = pytest.mark.parametrize("version", ["7.0", "6.2"])


async def until_state(client: Redis, **wanted: object) -> None:
    async with asyncio.timeout(10):
        while True:
            info = await client.info()
            if all(info.get(name) == value for name, value in wanted.items()):
                return
            await asyncio.sleep(0.02)


@VERSIONS
class TestDemoted:
    async def test_a_primary_that_becomes_a_replica_is_unavailable_until_it_is_one_again(
        self, version: str, make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, second = await start_server(*PROMPT, version=version), await start_server(version=version)
        store = make_store(second.url)
        await acquire(store)
        async with Redis.from_url(second.url) as operator:
            await operator.replicaof("127.0.0.1", first.port)
            await until_state(operator, role="slave", master_link_status="up")
            for n in range(10):
                with pytest.raises(StoreUnavailableError):
                    await acquire(store, str(n))
            assert heard(caplog, "is not available: it is no longer the primary") == 1
            await assert_outage_policies_hold(store)
            await operator.replicaof("NO", "ONE")
            await assert_recovers_unasked(store, caplog)

    async def test_a_claim_is_not_granted_by_a_replica(
        self, version: str, make_store: MakeStore, start_server: StartServer
    ) -> None:
        first, second = await start_server(*PROMPT, version=version), await start_server(version=version)
        store = make_store(second.url)
        assert isinstance(await claim(store, "before"), Claimed)
        async with Redis.from_url(second.url) as operator:
            await operator.replicaof("127.0.0.1", first.port)
            await until_state(operator, role="slave", master_link_status="up")
            with pytest.raises(StoreUnavailableError):
                await claim(store, "k")

    async def test_a_start_on_a_replica_is_refused_and_says_why(
        self, version: str, make_store: MakeStore, start_server: StartServer
    ) -> None:
        first = await start_server(version=version)
        replica = await start_server("--replicaof", "127.0.0.1", str(first.port), version=version)
        store = make_store(replica.url)
        with pytest.raises(StoreUnavailableError, match="it is a replica, and a count or claim needs the primary"):
            await acquire(store)


@pytest.mark.slow
@VERSIONS
async def test_after_the_sentinels_promoted_a_replica_calls_succeed_again(
    version: str, make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    primary = await start_server(*PROMPT, version=version)
    replica = await start_server("--replicaof", "127.0.0.1", str(primary.port), version=version)
    async with Sentinel(binary(version), primary) as watcher:
        names = SentinelClient([("127.0.0.1", watcher.port)])  # type: ignore[no-untyped-call]
        store = make_store(names.master_for("mymaster"))
        await until_replicated(watcher, primary, replica)
        for _ in range(3):
            usage = await acquire(store)
        assert isinstance(await claim(store, "k"), Claimed)
        async with Redis.from_url(primary.url) as client:
            assert await client.wait(1, 1000) == 1
        primary.kill()
        with pytest.raises(ResilienceError):
            await acquire(store)
        await until_answered(store, within=15)
        # The replica had it all: the count goes on, and the claim still stands.
        assert (await acquire(store)).remaining < usage.remaining
        assert not isinstance(await claim(store, "k", "twin"), Claimed)
        assert heard(caplog, "is not available") == 1
        assert heard(caplog, "available again") == 1
        await store.aclose()
        for sentinel in names.sentinels:
            await sentinel.aclose()


async def until_replicated(watcher: RedisServer, primary: RedisServer, replica: RedisServer) -> None:
    """Wait until the replica is in step, and the sentinel knows of it."""
    async with asyncio.timeout(15), Redis.from_url(watcher.url) as names, Redis.from_url(replica.url) as client:
        await until_state(client, master_link_status="up", master_port=primary.port)
        while (await names.info("sentinel"))["master0"]["slaves"] != 1:  # noqa: ASYNC110 - as in until
            await asyncio.sleep(0.05)
