"""Wrong URLs, wrong passwords, wrong settings, wrong values, and a server that is too old."""

import asyncio

import pytest
from redis.asyncio import Redis

from resilience import (
    ConfigurationError,
    IdempotencyPolicy,
    Quota,
    RateLimitPolicy,
    Rule,
    StoreUnavailableError,
)
from resilience.decisions.idempotency import Claimed
from resilience.errors import ForeignValueError
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore
from tests.faults.redis_scene import (
    FINGERPRINT,
    QUOTA,
    Antique,
    MakeStore,
    StartServer,
    acquire,
    ask,
    assert_outage_policies_hold,
    assert_recovers_unasked,
    claim,
    heard,
    serving,
    timed,
)
from tests.support.redis_servers import RedisServer

SECRET = "s3cret-of-mine"


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@localhost:6379",
        f"redis//:{SECRET}@localhost",
        f"redis://:{SECRET}@localhost:port",
        f"redis://:{SECRET}@localhost:99999",
        f"redis://:{SECRET}/x@localhost:6379",
        f"redis://:{SECRET}@[::1",
        f"redis://:{SECRET}@localhost:6379?socket_timeout=soon",
        f"redis+cluster://:{SECRET}@localhost:port",
        f"{SECRET}",
        "",
    ],
)
def test_a_malformed_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RedisStore(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__
    assert "redis://" in str(caught.value)


@pytest.mark.parametrize("prefix", ["", " ", "a b", "{a}", "a:b", "ä", "a" * 65])
def test_a_malformed_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="prefix"):
        RedisStore("redis://localhost", prefix=prefix)


class TestAccess:
    async def test_a_wrong_password_is_unavailable_and_never_logged(
        self, make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG")
        server = await start_server()
        async with Redis.from_url(server.url) as operator:
            await operator.config_set("requirepass", "another")
            store = make_store(f"redis://:{SECRET}@127.0.0.1:{server.port}")
            with pytest.raises(StoreUnavailableError) as caught:
                await acquire(store)
            await assert_outage_policies_hold(store)
            assert SECRET not in str(caught.value)
            assert heard(caplog, "AuthenticationError") == 1
            await operator.config_set("requirepass", SECRET)
            await assert_recovers_unasked(store, caplog)
        assert SECRET not in caplog.text

    async def test_what_the_acl_denies_is_unavailable(
        self, make_store: MakeStore, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Redis.from_url(server.url) as operator:
            rules = ("on", f">{SECRET}", "~resilience:*", "+@all", "-eval", "-evalsha", "-set")
            await operator.execute_command("ACL", "SETUSER", "app", *rules)  # type: ignore[no-untyped-call]
        store = make_store(f"redis://app:{SECRET}@127.0.0.1:{server.port}")
        with pytest.raises(StoreUnavailableError, match="NOPERM"):
            await acquire(store)
        with pytest.raises(StoreUnavailableError, match="NOPERM"):
            await claim(store, "k")
        await assert_outage_policies_hold(store)
        assert SECRET not in caplog.text

    async def test_an_acl_that_forbids_scripts_or_keys_is_unavailable(
        self, make_store: MakeStore, server: RedisServer
    ) -> None:
        async with Redis.from_url(server.url) as operator:
            for name, rules in {"noscript": ("~*", "+@all", "-script"), "nokeys": ("~other:*", "+@all")}.items():
                await operator.execute_command("ACL", "SETUSER", name, "on", f">{SECRET}", *rules)  # type: ignore[no-untyped-call]
        for name in ("noscript", "nokeys"):
            store = make_store(f"redis://{name}:{SECRET}@127.0.0.1:{server.port}")
            with pytest.raises(StoreUnavailableError, match="NOPERM"):
                await acquire(store)
            await assert_outage_policies_hold(store)

    async def test_where_info_is_denied_it_works_unchecked_and_says_so_once(
        self, make_store: MakeStore, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Redis.from_url(server.url) as operator:
            rules = ("on", f">{SECRET}", "~resilience:*", "+@all", "-info")
            await operator.execute_command("ACL", "SETUSER", "app", *rules)  # type: ignore[no-untyped-call]
        store = make_store(f"redis://app:{SECRET}@127.0.0.1:{server.port}")
        assert (await acquire(store)).allowed
        assert isinstance(await claim(store, "k"), Claimed)
        assert heard(caplog, "does not let us ask INFO") == 1


async def test_a_policy_that_may_drop_records_is_warned_of_once(
    make_store: MakeStore, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    server = await start_server(*options)
    store = make_store(server.url)
    await acquire(store)
    server.kill()
    await start_server(*options, port=server.port)
    await assert_recovers_unasked(store, caplog)
    assert heard(caplog, "maxmemory-policy is allkeys-lru") == 1


async def test_too_old_a_server_is_refused_and_says_why(make_store: MakeStore) -> None:
    async with serving(Antique) as (url, _):
        store = make_store(url)
        with pytest.raises(StoreUnavailableError, match=r"it is version 5\.0\.14; 6\.2 is the oldest that works"):
            await acquire(store)
        await assert_outage_policies_hold(store)


ALGORITHMS = pytest.mark.parametrize("algorithm", ["sliding_window", "token_bucket", "fixed_window"])


@pytest.mark.parametrize("version", ["7.0", "6.2"])
class TestForeignValues:
    @ALGORITHMS
    @pytest.mark.parametrize("spoil", ["by hand", "truncated", "longer", "another type"])
    async def test_a_count_that_is_not_ours_is_named_and_never_passes(
        self, version: str, algorithm: str, spoil: str, make_store: MakeStore, start_server: StartServer
    ) -> None:
        server = await start_server(version=version)
        store = make_store(server.url)
        burst = 5 if algorithm == "token_bucket" else None
        quota = Quota(5, per=60, algorithm=algorithm, burst=burst)  # type: ignore[arg-type]
        policies = [RateLimitPolicy(store, Rule(quota), on_outage=way) for way in ("open", "closed")]
        async with Redis.from_url(server.url) as operator:
            await ask(policies[0])
            key = await _only_key(operator)
            await _spoil(operator, key, spoil)
            for policy in policies:
                with pytest.raises(ForeignValueError) as caught:
                    await ask(policy)
                assert caught.value.key == key.decode()

    @pytest.mark.parametrize("spoil", ["by hand", "truncated", "fingerprint truncated", "another type"])
    async def test_a_record_that_is_not_ours_is_named_and_never_passes(
        self, version: str, spoil: str, make_store: MakeStore, start_server: StartServer
    ) -> None:
        server = await start_server(version=version)
        store = make_store(server.url)
        policies = [IdempotencyPolicy(store, on_outage=way) for way in ("open", "closed")]
        async with Redis.from_url(server.url) as operator:
            await ask(policies[0])
            key = await _only_key(operator)
            await _spoil(operator, key, spoil)
            for policy in policies:
                with pytest.raises(ForeignValueError) as caught:
                    await ask(policy)
                assert caught.value.key == key.decode()

    @pytest.mark.parametrize("spoil", ["by hand", "truncated", "another type"])
    async def test_a_record_that_is_not_ours_is_never_overwritten(
        self, version: str, spoil: str, make_store: MakeStore, start_server: StartServer
    ) -> None:
        server = await start_server(version=version)
        store = make_store(server.url)
        async with Redis.from_url(server.url) as operator:
            await claim(store, "k")
            key = await _only_key(operator)
            await _spoil(operator, key, spoil)
            before = await operator.dump(key)
            with pytest.raises(ForeignValueError):
                await store.complete("k", "mine", FINGERPRINT, None, ttl=60)
            for call in (store.renew("k", "mine", lease=30, ttl=60), store.release("k", "mine")):
                _, result = await timed(call)
                assert result is False or isinstance(result, ForeignValueError)
            assert await operator.dump(key) == before

    @pytest.mark.parametrize("spoil", ["by hand", "another type"])
    async def test_a_foreign_count_of_one_caller_is_no_affair_of_others_who_call_at_the_same_time(
        self, version: str, spoil: str, make_store: MakeStore, start_server: StartServer
    ) -> None:
        server = await start_server(version=version)
        store = make_store(server.url)
        async with Redis.from_url(server.url) as operator:
            await acquire(store, "spoilt")
            await _spoil(operator, await _only_key(operator), spoil)
        names = ["first", "spoilt", "last"] * 3
        answers = await asyncio.gather(*(timed(acquire(store, name)) for name in names))
        for name, (_, result) in zip(names, answers, strict=True):
            assert isinstance(result, ForeignValueError) if name == "spoilt" else result.allowed
        for name in ("first", "last"):
            assert (await acquire(store, name)).remaining == QUOTA.limit - 4

    async def test_one_foreign_count_leaves_the_others_of_its_turn_alone(
        self, version: str, make_store: MakeStore, start_server: StartServer
    ) -> None:
        server = await start_server(version=version)
        store = make_store(server.url)
        wants = [Want("rule", str(n), Quota(5, per=60), 1) for n in range(3)]
        async with Redis.from_url(server.url) as operator:
            await store.acquire(wants[1:2])
            key = await _only_key(operator)
            await operator.set(key, "x")
            with pytest.raises(ForeignValueError, match="was not written by this library"):
                await store.acquire(wants)
            assert len(await operator.keys()) == 1


async def _only_key(operator: Redis) -> bytes:
    (key,) = await operator.keys()
    assert isinstance(key, bytes)
    return key


async def _spoil(operator: Redis, key: bytes, how: str) -> None:
    value = await operator.get(key)
    assert isinstance(value, bytes)
    match how:
        case "by hand":
            await operator.set(key, "1")
        case "truncated":
            await operator.set(key, value[: min(len(value) - 1, 38)])
        case "fingerprint truncated":
            await operator.set(key, value[:45])
        case "longer":
            await operator.set(key, value + b"x")
        case _:
            await operator.delete(key)
            await operator.rpush(key, 1)
