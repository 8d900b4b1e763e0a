"""Sealed replies in real servers: what is there to be read, and what processes with other keys make of it."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from resilience import Reply
from resilience.decisions.idempotency import Claim, Claimed, Completed, InProgress, Mismatched, Takeover
from resilience.settings import Settings
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer, binary

_names = count()
OLD, NEW = b"\1" * 32, b"\2" * 32
PRINT, OTHER_PRINT, FOREIGN_PRINT = b"http:" + b"1" * 32, b"http:" + b"2" * 32, b"grpc:" + b"1" * 32
SECRET = b"4111-1111-1111-1111"
REPLY = Reply("http", 201, (("location", "/cards/hidden"),), b'{"card":"%s"}' % SECRET, b"=" + SECRET)
LONG = replace(REPLY, body=SECRET * 200)
SEALED: dict[str, Any] = {"compress": True, "encryption": {"old": OLD}}


def serving(version: str) -> Iterator[RedisServer]:
    with asyncio.Runner() as runner:
        server = runner.run(RedisServer(binary(version)).__aenter__())
        yield server
        runner.run(server.__aexit__())


@pytest.fixture(scope="module")
def redis_70() -> Iterator[RedisServer]:
    yield from serving("7.0")


@pytest.fixture(scope="module")
def redis_62() -> Iterator[RedisServer]:
    yield from serving("6.2")


@pytest.fixture(params=["redis_70", "redis_62"])
def server(request: pytest.FixtureRequest) -> RedisServer:
    found: RedisServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def admin(server: RedisServer) -> AsyncIterator[Any]:
    async with Redis.from_url(server.url) as client:
        yield client


@asynccontextmanager
async def opened(server: RedisServer, **options: Any) -> AsyncIterator[RedisStore]:
    store = RedisStore(server.url, limit_timeout=5, record_timeout=5, **options)
    await store.release("nothing", "nobody")
    try:
        yield store
    finally:
        await store.aclose()


def unique() -> str:
    return f"sealed-{next(_names)}"


async def claim(
    store: RedisStore, key: str, token: str, print_: bytes = PRINT, lease: float = 30, takeover: Takeover = "reexecute"
) -> Claim:
    return await store.claim(key, token, print_, lease=lease, ttl=60, takeover=takeover)


async def complete(store: RedisStore, key: str, reply: Reply | None = REPLY) -> None:
    assert await claim(store, key, "a") == Claimed(1)
    assert await store.complete(key, "a", PRINT, reply, ttl=60)


@pytest.mark.parametrize("reply", [REPLY, LONG], ids=["short", "long"])
async def test_what_is_in_redis_tells_neither_reply_nor_payload(server: RedisServer, admin: Any, reply: Reply) -> None:
    key = unique()
    async with opened(server, **SEALED) as store:
        await complete(store, key, reply)
        raw = await admin.get(store._record_key(key))
        assert await claim(store, key, "b") == Completed(reply)
    for hidden in (SECRET, b"hidden", b"location", PRINT[5:]):
        assert hidden not in raw


async def test_a_running_record_does_not_tell_the_payload(server: RedisServer, admin: Any) -> None:
    key = unique()
    async with opened(server, **SEALED) as store:
        await claim(store, key, "a")
        assert PRINT[5:] not in await admin.get(store._record_key(key))
        assert isinstance(await claim(store, key, "b"), InProgress)
        assert await claim(store, key, "b", OTHER_PRINT) == Mismatched()


async def test_a_long_reply_takes_less_room(server: RedisServer, admin: Any) -> None:
    key = unique()
    async with opened(server, compress=True) as store, opened(server) as plain:
        await complete(store, key, LONG)
        assert await admin.strlen(store._record_key(key)) < len(LONG.body) // 10
        assert await claim(plain, key, "b") == Completed(LONG)


async def test_a_reply_that_was_moved_is_done_and_not_replayable(server: RedisServer, admin: Any) -> None:
    victim, mine = unique(), unique()
    async with opened(server, **SEALED) as store:
        await complete(store, victim)
        await admin.copy(store._record_key(victim), store._record_key(mine))
        assert await claim(store, mine, "b") == Completed(None)
        assert await claim(store, victim, "b") == Completed(REPLY)


@pytest.mark.parametrize("options", [{}, {"encryption": {"new": NEW}}, {"encryption": {"old": NEW}}])
async def test_without_the_key_a_reply_is_done_and_not_replayable(server: RedisServer, options: dict[str, Any]) -> None:
    key = unique()
    async with opened(server, **SEALED) as store, opened(server, **options) as other:
        await complete(store, key)
        seen = [await claim(other, key, "b"), await claim(other, key, "c", FOREIGN_PRINT)]
        # Of one id and two secrets, only the fingerprint is left to tell them apart, and it is refused at once.
        assert seen == [Mismatched() if "old" in options.get("encryption", ()) else Completed(None), Completed(None)]
        standing = await other.inspect(key)
        assert standing is not None
        assert (standing.state, standing.reply) == ("completed", None)
        assert await claim(store, key, "b") == Completed(REPLY)


async def test_while_keys_change_replies_and_payloads_are_known(server: RedisServer) -> None:
    steps = [{"old": OLD}, {"old": OLD, "new": NEW}, {"new": NEW, "old": OLD}, {"new": NEW}]
    for before, after in pairwise(steps):
        async with opened(server, encryption=before) as one, opened(server, encryption=after) as two:
            for writer, reader in ((one, two), (two, one)):
                if next(iter(writer._sealing._keys)) not in reader._sealing._keys:
                    continue
                await complete(writer, key := unique())
                assert await claim(reader, key, "b") == Completed(REPLY)
                assert await claim(reader, key, "b", OTHER_PRINT) == Mismatched()
                await claim(writer, key := unique(), "a")
                assert isinstance(await claim(reader, key, "b"), InProgress)


async def test_a_dead_owners_payload_is_compared_while_keys_change(redis_70: RedisServer) -> None:
    key = unique()
    async with opened(redis_70, **SEALED) as one, opened(redis_70, encryption={"new": NEW, "old": OLD}) as two:
        await claim(one, key, "a", lease=0.001)
        await asyncio.sleep(0.01)
        assert await claim(two, key, "b", OTHER_PRINT) == Mismatched()
        assert await claim(two, key, "b") == Claimed(2)
        assert not await one.complete(key, "a", PRINT, None, ttl=60)
        assert await two.complete(key, "b", PRINT, REPLY, ttl=60)
        assert await claim(one, key, "c") == Completed(None)


async def test_replies_from_before_encryption_are_replayed_until_they_are_refused(server: RedisServer) -> None:
    key = unique()
    async with opened(server) as plain, opened(server, **SEALED) as store:
        await complete(plain, key)
        assert await claim(store, key, "b") == Completed(REPLY)
        assert await claim(store, key, "b", OTHER_PRINT) == Mismatched()
        async with opened(server, **SEALED, refuse_unsealed=True) as strict:
            assert await claim(strict, key, "b") == Completed(None)


async def test_an_operators_answer_is_sealed_and_can_be_sent_twice(server: RedisServer, admin: Any) -> None:
    key = unique()
    async with opened(server, **SEALED) as store, opened(server) as plain:
        for each, name in ((store, key), (plain, other := unique())):
            await claim(each, name, "a", lease=0.001)
            await asyncio.sleep(0.01)
            assert await each.resolve(name, REPLY, ttl=60)
            assert await each.resolve(name, REPLY, ttl=60)
            assert await claim(each, name, "b") == Completed(REPLY)
            assert await claim(each, name, "b", OTHER_PRINT) == Mismatched()
        raw, clear = await admin.get(store._record_key(key)), await admin.get(plain._record_key(other))
        assert SECRET not in raw
        assert raw[26:42] != clear[26:42]  # the operator's token follows from the reply


async def test_the_settings_seal(
    server: RedisServer, admin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("IDEMPOTENCY_COMPRESSION", "true")
    monkeypatch.setenv("IDEMPOTENCY_ENCRYPTION_KEYS", f"old:{b64encode(OLD).decode()}")
    store, key = Settings.load().store(), unique()
    assert isinstance(store, RedisStore)
    try:
        await store.complete(key, "a", PRINT, LONG, ttl=60)
        raw = await admin.get(store._record_key(key))
        assert SECRET not in raw
        assert len(raw) < len(LONG.body) // 10
    finally:
        await store.aclose()
    async with opened(server, **SEALED) as other:
        assert await claim(other, key, "b") == Completed(LONG)
