"""The Redis store against real servers: what it shares, what it costs, and what it leaves behind."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from secrets import token_hex
from typing import Any

import pytest
import uvloop
from fastapi import FastAPI
from redis.asyncio import Redis

from http_middleware import install
from resilience import Call, IdempotencyPolicy, Pipeline, Quota, RateLimitPolicy, Reply, Rule, get_request_id
from resilience.decisions.idempotency import Claimed, Completed, InProgress, record_key
from resilience.errors import ConfigurationError, ForeignValueError
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore
from tests.integration.http_driver import connect
from tests.support.calls import Sent
from tests.support.redis_servers import RedisServer, binary

_names = count()
PRINT = b"http:" + b"1" * 32
REPLY = Reply("http", 201, (("a", "b"),), b"body")
QUOTAS = (
    Quota(5, per=60),
    Quota(5, per=60, algorithm="sliding_log"),
    Quota(5, per=60, algorithm="token_bucket", burst=5),
    Quota(5, per=3600, algorithm="fixed_window"),
    Quota(5, calendar="month"),
)
each_quota = pytest.mark.parametrize("quota", QUOTAS, ids=["window", "log", "bucket", "fixed", "calendar"])


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
def either(request: pytest.FixtureRequest) -> RedisServer:
    server: RedisServer = request.getfixturevalue(request.param)
    return server


@asynccontextmanager
async def opened(server: RedisServer, **options: Any) -> AsyncIterator[RedisStore]:
    """A store whose connection is open."""
    store = RedisStore(server.url, limit_timeout=5, record_timeout=5, **options)
    await store.release("nothing", "nobody")
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def store(redis_70: RedisServer) -> AsyncIterator[RedisStore]:
    async with opened(redis_70) as store:
        yield store


@pytest.fixture
async def other(redis_70: RedisServer) -> AsyncIterator[RedisStore]:
    async with opened(redis_70) as store:
        yield store


@pytest.fixture
async def admin(redis_70: RedisServer) -> AsyncIterator[Any]:
    async with Redis.from_url(redis_70.url) as client:
        yield client


def unique(name: str) -> str:
    return f"{name}-{next(_names)}"


def want(subject: str, quota: Quota = QUOTAS[0], cost: int = 1) -> Want:
    return Want(quota.name, subject, quota, cost)


async def allowed(store: RedisStore, *wants: Want) -> bool:
    return all(usage.allowed for usage in await store.acquire(wants))


@pytest.fixture
async def commands(redis_70: RedisServer, admin: Any) -> AsyncIterator[Callable[[], Awaitable[list[str]]]]:
    """Tell what was sent to the server since it was last asked; what scripts do there costs no round trip."""
    async with Redis.from_url(redis_70.url) as teller, admin.monitor() as monitor:
        await teller.ping()

        async def since() -> list[str]:
            mark = token_hex(8)
            found: list[str] = []
            await teller.echo(mark)
            async with asyncio.timeout(5):
                async for entry in monitor.listen():
                    if mark in entry["command"]:
                        return found
                    if entry["client_type"] != "lua":
                        found.append(entry["command"].split(" ")[0].upper())
            raise AssertionError("The mark was not heard")

        await since()
        yield since


Commands = Callable[[], Awaitable[list[str]]]


@each_quota
async def test_two_stores_share_a_count(store: RedisStore, other: RedisStore, quota: Quota) -> None:
    who = want(unique("shared"), quota)
    left = [(await each.acquire([who]))[0].remaining for each in (store, other, store, other, store)]
    assert left == [4, 3, 2, 1, 0]
    assert not await allowed(store, who)
    assert not await allowed(other, who)


@each_quota
async def test_of_many_calls_through_two_stores_no_more_than_the_limit_pass(
    store: RedisStore, other: RedisStore, quota: Quota
) -> None:
    who = want(unique("crowd"), quota)
    answers = await asyncio.gather(*(allowed(each, who) for _ in range(50) for each in (store, other)))
    assert sum(answers) == 5


async def test_two_stores_share_records(store: RedisStore, other: RedisStore) -> None:
    key = unique("record")
    assert await store.claim(key, "a", PRINT, lease=5, ttl=60, takeover="refuse") == Claimed(1)
    assert isinstance(await other.claim(key, "b", PRINT, lease=5, ttl=60, takeover="refuse"), InProgress)
    assert not await other.complete(key, "b", PRINT, None, ttl=60)
    assert await store.complete(key, "a", PRINT, REPLY, ttl=60)
    assert await other.claim(key, "b", PRINT, lease=5, ttl=60, takeover="refuse") == Completed(REPLY)


async def test_stores_of_two_prefixes_share_nothing(redis_70: RedisServer, store: RedisStore) -> None:
    who, key = want(unique("prefix"), cost=5), unique("prefix")
    async with opened(redis_70, prefix="another.one") as apart:
        assert await allowed(store, who)
        assert await allowed(apart, who)
        for each in (store, apart):
            assert await each.claim(key, "a", PRINT, lease=5, ttl=60, takeover="refuse") == Claimed(1)


async def test_a_hundred_calls_of_one_turn_are_one_round_trip_while_another_is_under_way(
    store: RedisStore, commands: Commands
) -> None:
    first = asyncio.ensure_future(store.acquire([want(unique("first"))]))
    await asyncio.sleep(0)
    who = want(unique("merged"), Quota(60, per=60))
    usages = await asyncio.gather(*(store.acquire([who]) for _ in range(100)))
    await first
    assert [usage.remaining for (usage,) in usages] == [*range(59, -1, -1), *[0] * 40]
    assert [usage.allowed for (usage,) in usages] == [True] * 60 + [False] * 40
    assert await commands() == ["EVALSHA"] * 2


async def test_a_hundred_calls_of_one_turn_are_no_more_than_two_round_trips(
    store: RedisStore, commands: Commands
) -> None:
    who = want(unique("merged"), Quota(60, per=60))
    assert sum(await asyncio.gather(*(allowed(store, who) for _ in range(100)))) == 60
    assert len(await commands()) <= 2


async def test_calls_for_different_subjects_of_one_turn_share_round_trips(
    store: RedisStore, commands: Commands
) -> None:
    subjects = [unique("apart") for _ in range(50)]
    assert all(await asyncio.gather(*(allowed(store, want(subject, cost=5)) for subject in subjects)))
    assert len(await commands()) <= 12
    assert not any(await asyncio.gather(*(allowed(store, want(subject)) for subject in subjects)))
    assert len(await commands()) <= 12


async def test_a_rate_limit_of_any_number_of_rules_is_one_round_trip(store: RedisStore, commands: Commands) -> None:
    who = unique("rules")
    for rules in range(1, len(QUOTAS) + 1):
        assert await allowed(store, *(Want(f"rule-{n}", who, quota, 1) for n, quota in enumerate(QUOTAS[:rules])))
        assert await commands() == ["EVALSHA"]


async def test_a_denied_caller_costs_no_round_trip_while_the_denial_is_known(
    store: RedisStore, commands: Commands
) -> None:
    who = want(unique("denied"))
    await store.acquire([who._replace(cost=5)])
    assert not await allowed(store, who)
    await commands()
    for _ in range(100):
        assert not await allowed(store, who)
    assert await commands() == []


async def test_a_denied_caller_is_admitted_again_when_it_was_told_to_come(store: RedisStore) -> None:
    who = want(unique("again"), Quota(5, per=0.3))
    await store.acquire([who._replace(cost=5)])
    (denied,) = await store.acquire([who])
    assert 0 < denied.retry_after <= 0.300001
    await asyncio.sleep(denied.retry_after / 2)
    (again,) = await store.acquire([who])
    assert 0 < again.retry_after < denied.retry_after
    await asyncio.sleep(again.retry_after + 0.001)
    assert await allowed(store, who)


def shop(*policies: Any) -> tuple[FastAPI, list[str]]:
    app, ran = FastAPI(), []

    @app.post("/orders/{item}", status_code=201)
    async def order(item: str) -> dict[str, int]:
        ran.append(item)
        return {"order": len(ran)}

    install(app, Pipeline(policies))
    return app, ran


async def test_a_new_keyed_request_is_two_round_trips_and_its_replay_one(store: RedisStore, commands: Commands) -> None:
    app, ran = shop(IdempotencyPolicy(store))
    client = connect(app, headers={"Idempotency-Key": unique("key")})
    first = await client.post("/orders/tea")
    assert await commands() == ["SET", "EVALSHA"]
    retry = await client.post("/orders/tea")
    assert await commands() == ["SET"]
    assert (retry.status_code, retry.content) == (first.status_code, first.content) == (201, b'{"order":1}')
    assert "x-idempotent-replayed" not in first.headers
    assert retry.headers["x-idempotent-replayed"] == "true"
    assert ran == ["tea"]


async def test_a_limit_holds_across_two_instances_of_a_service(store: RedisStore, other: RedisStore) -> None:
    rule = Rule("3/minute", name=unique("orders"))
    instances = [shop(RateLimitPolicy(each, rule))[0] for each in (store, other)]
    clients = [connect(app) for app in instances]
    replies = [await clients[n % 2].post("/orders/tea") for n in range(5)]
    assert [reply.status_code for reply in replies] == [201, 201, 201, 429, 429]
    assert [reply.headers["x-ratelimit-remaining"] for reply in replies] == ["2", "1", "0", "0", "0"]
    assert 0 < int(replies[-1].headers["retry-after"]) <= 61


async def test_a_key_runs_once_across_two_instances_of_a_service(store: RedisStore, other: RedisStore) -> None:
    headers = {"Idempotency-Key": unique("key")}
    shops = [shop(IdempotencyPolicy(each)) for each in (store, other)]
    first, retry = [await connect(app, headers=headers).post("/orders/tea") for app, _ in shops]
    assert (first.status_code, first.content) == (retry.status_code, retry.content)
    assert retry.headers["x-idempotent-replayed"] == "true"
    assert [ran for _, ran in shops] == [["tea"], []]
    mismatched = await connect(shops[1][0], headers=headers).post("/orders/tea", json={"another": "payload"})
    assert mismatched.status_code == 422


async def test_no_key_is_kept_for_ever_and_none_tells_whom_or_what_it_is_for(either: RedisServer) -> None:
    secrets = [f"{name}-in-clear" for name in ("subject", "rule", "header", "caller", "operation", "token")]
    subject, rule, header, caller, operation, token = secrets
    async with opened(either) as store, Redis.from_url(either.url) as client:
        await client.flushdb()
        for n, quota in enumerate(QUOTAS):
            await store.acquire([Want(f"{rule}-{n}", subject, quota, 1)])
            await asyncio.gather(*(store.acquire([Want(f"{rule}-{n}", subject, quota, 1)]) for _ in range(9)))
        for state in ("claimed", "renewed", "completed", "lost", "taken over"):
            key = record_key("ns", operation, caller, header + state)
            lease = 0.05 if state == "taken over" else 5.0
            if state != "lost":
                await store.claim(key, token, PRINT, lease=lease, ttl=60, takeover="reexecute")
            if state == "renewed":
                assert await store.renew(key, token, lease=5, ttl=60)
            if state in ("completed", "lost"):
                assert await store.complete(key, token, PRINT, REPLY, ttl=60)
            if state == "taken over":
                await asyncio.sleep(0.08)
                claim = await store.claim(key, "next", PRINT, lease=5, ttl=60, takeover="reexecute")
                assert claim == Claimed(2)
        keys = [key async for key in client.scan_iter(count=1000)]
        assert len(keys) == len(QUOTAS) + 5
        for key in keys:
            assert await client.pttl(key) > 0
            assert key.startswith(b"resilience:v1:{")
            assert b"clear" not in key


@each_quota
async def test_a_reset_is_seen_by_the_same_store_at_once(store: RedisStore, quota: Quota) -> None:
    who = want(unique("reset"), quota)
    await store.acquire([who._replace(cost=5)])
    assert not await allowed(store, who)
    await store.reset(quota.name, who.subject)
    assert (await store.acquire([who]))[0].remaining == 4


@each_quota
@pytest.mark.parametrize("turns", [0, 1])
async def test_a_reset_is_seen_though_a_call_was_denied_while_it_went_on(
    store: RedisStore, quota: Quota, turns: int
) -> None:
    who = want(unique("reset"), quota)
    await store.acquire([who._replace(cost=5)])
    resetting = asyncio.ensure_future(store.reset(quota.name, who.subject))
    for _ in range(turns):
        await asyncio.sleep(0)
    meanwhile = asyncio.ensure_future(store.acquire([who]))
    await resetting
    used = 1 if (await meanwhile)[0].allowed else 0
    assert (await store.acquire([who]))[0].remaining == 4 - used


async def test_a_reset_is_seen_by_another_store_within_a_second(store: RedisStore, other: RedisStore) -> None:
    who = want(unique("reset"))
    await store.acquire([who._replace(cost=5)])
    assert not await allowed(other, who)
    await store.reset(who.rule, who.subject)
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not await allowed(other, who):
        assert loop.time() - started < 1.1
        await asyncio.sleep(0.02)


async def test_a_server_that_forgets_its_scripts_is_not_noticed(either: RedisServer) -> None:
    async with opened(either) as store, Redis.from_url(either.url) as client:
        who, key = want(unique("flush")), unique("flush")
        for left in (4, 3, 2):
            await client.script_flush()
            assert (await store.acquire([who]))[0].remaining == left
        await client.script_flush()
        assert sum(await asyncio.gather(*(allowed(store, who) for _ in range(10)))) == 2
        await client.script_flush()
        assert await store.claim(key, "a", PRINT, lease=5, ttl=60, takeover="reexecute") == Claimed(1)
        await client.script_flush()
        claim = await store.claim(key, "b", PRINT, lease=5, ttl=60, takeover="reexecute")
        assert isinstance(claim, InProgress)
        await client.script_flush()
        assert await store.renew(key, "a", lease=5, ttl=60)
        await client.script_flush()
        assert await store.complete(key, "a", PRINT, REPLY, ttl=60)
        await client.script_flush()
        assert not await store.release(key, "a")
        assert await store.claim(key, "b", PRINT, lease=5, ttl=60, takeover="reexecute") == Completed(REPLY)


async def plant(client: Any, key: str, kind: str) -> None:
    if kind == "list":
        await client.rpush(key, "foreign")
    else:
        await client.set(key, "foreign")


@each_quota
@pytest.mark.parametrize("kind", ["string", "list"])
async def test_a_foreign_value_under_a_count_is_told(either: RedisServer, quota: Quota, kind: str) -> None:
    async with opened(either) as store, Redis.from_url(either.url) as client:
        who = want(unique("foreign"), quota)
        await store.acquire([who])
        (key,) = [
            key async for key in client.scan_iter(match=f"{store._count_key('', who.subject, '').split('}')[0]}*")
        ]
        await client.delete(key)
        await plant(client, key, kind)
        with pytest.raises(ForeignValueError) as told:
            await store.acquire([who])
        assert told.value.key == key.decode()


@pytest.mark.parametrize("kind", ["string", "list"])
async def test_of_several_counts_the_foreign_one_is_told(either: RedisServer, kind: str) -> None:
    async with opened(either) as store, Redis.from_url(either.url) as client:
        fine = want(unique("foreign"))
        foul = want(fine.subject, Quota(7, per=77))
        await plant(client, key := store._count_key(foul.rule, foul.subject, "S"), kind)
        with pytest.raises(ForeignValueError) as told:
            await store.acquire([fine, foul])
        assert told.value.key == key


@pytest.mark.parametrize("kind", ["string", "list"])
async def test_a_foreign_value_under_one_count_disturbs_no_other(either: RedisServer, kind: str) -> None:
    async with opened(either) as store, Redis.from_url(either.url) as client:
        fine, foul = want(unique("fine")), want(unique("foul"))
        await plant(client, store._count_key(foul.rule, foul.subject, "S"), kind)
        calls = [store.acquire([who]) for who in (want(unique("first")), fine, foul, fine)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[2], ForeignValueError)
        assert [answer[0].remaining for answer in answers if isinstance(answer, list)] == [4, 4, 3]


@pytest.mark.parametrize("kind", ["string", "list"])
async def test_a_foreign_value_under_a_record_is_never_a_pass(either: RedisServer, kind: str) -> None:
    async with opened(either) as store, Redis.from_url(either.url) as client:
        key = unique("foreign")
        await plant(client, store._record_key(key), kind)
        with pytest.raises(ForeignValueError):
            await store.claim(key, "a", PRINT, lease=5, ttl=60, takeover="reexecute")
        with pytest.raises(ForeignValueError):
            await store.complete(key, "a", PRINT, REPLY, ttl=60)


@pytest.mark.parametrize("prefix", ["", "a:b", "a b", "a{b", "é", "x" * 65])
def test_a_prefix_that_is_none_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError):
        RedisStore("redis://localhost", prefix=prefix)


async def test_the_log_of_an_outage_does_not_carry_the_ids_of_the_call_that_met_it(
    redis_70: RedisServer,
) -> None:
    back = asyncio.Event()
    ids: list[str | None] = []

    class Ids(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            ids.append(get_request_id())
            if "available again" in record.getMessage():
                back.set()
            return True

    logger = logging.getLogger("resilience")
    store = RedisStore(redis_70.url, limit_timeout=5, record_timeout=5)
    filter_ = Ids()
    logger.addFilter(filter_)
    try:
        pipeline = Pipeline([RateLimitPolicy(store, "100/minute")])
        async with pipeline.admit(Call("http", "GET /", Sent())) as admission:
            await admission.admit(pipeline.core)
            async with Redis.from_url(redis_70.url) as other:
                await other.client_kill_filter(_type="normal", skipme=True)
            await asyncio.wait_for(back.wait(), 10)
    finally:
        logger.removeFilter(filter_)
        await store.aclose()
    assert ids == [None] * len(ids)
    assert len(ids) == 2


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_loop_that_stood_still_does_not_take_the_server_for_gone(
    redis_70: RedisServer, make_loop: Callable[[], asyncio.AbstractEventLoop], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        store = RedisStore(redis_70.url, limit_timeout=0.05)
        ours, theirs = socket.socketpair()

        def stall() -> None:
            # Where a loop reads its sockets: uvloop looks at its timers before it reads the next.
            ours.recv(1)
            time.sleep(0.12)

        asyncio.get_running_loop().add_reader(ours, stall)
        try:
            await store.release("nothing", "nobody")
            for _ in range(5):
                theirs.send(b"!")
                (usage,) = await store.acquire([Want("r", "still", Quota(1000, per=60), 1)])
                assert usage.allowed
        finally:
            asyncio.get_running_loop().remove_reader(ours)
            ours.close()
            theirs.close()
            await store.aclose()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(scenario())
    assert "not available" not in caplog.text
