"""What the tests of Redis' accidents share: calls and how long they took, peers that misbehave, what is left open."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import hiredis
import pytest

from resilience import (
    PROCEED,
    Call,
    IdempotencyPolicy,
    Pipeline,
    Policy,
    Quota,
    RateLimitPolicy,
    Reason,
    Reject,
    ResilienceError,
    Verdict,
)
from resilience.decisions.idempotency import Claim, Claimed
from resilience.decisions.quota import Usage
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore
from tests.support.redis_servers import RedisServer

LIMIT_TIMEOUT, RECORD_TIMEOUT = 0.05, 0.25  # What RedisStore has by default.
GRACE = 0.02  # What a call may take past its deadline.
RECOVERY = 3.0  # Seconds from a server's return to the store's.
QUOTA = Quota(1_000_000, per=60)
FINGERPRINT = b"http:f"

MakeStore = Callable[..., RedisStore]
StartServer = Callable[..., Awaitable[RedisServer]]


async def acquire(store: RedisStore, subject: str = "anyone", quota: Quota = QUOTA) -> Usage:
    (usage,) = await store.acquire([Want("rule", subject, quota, 1)])
    return usage


async def claim(store: RedisStore, key: str, owner: str = "mine") -> Claim:
    return await store.claim(key, owner, FINGERPRINT, lease=30, ttl=60, takeover="refuse")


async def timed(call: Awaitable[Any]) -> tuple[float, Any]:
    """Return how long an await took, and what came of it, an error of ours included."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    try:
        result = await call
    except ResilienceError as error:
        result = error
    return loop.time() - start, result


async def best_of_three(scenario: Callable[[], Awaitable[float]]) -> float:
    """Return the best of three rounds: a machine that was busy in one of them proves nothing of the code."""
    return min([await scenario() for _ in range(3)])


class Told(Call):
    """A keyed POST, as a door would tell it."""

    def __init__(self, key: str = "k") -> None:
        class Sent:
            def __init__(self) -> None:
                self.sent = {"idempotency-key": key}

            def get(self, name: str) -> str | None:
                return key if name == "idempotency-key" else None

            def get_all(self, name: str) -> list[str]:
                return [key] if name == "idempotency-key" else []

        async def payload(_limit: int) -> bytes:
            return b""

        super().__init__("http", "POST /orders", Sent(), peer="10.0.0.1", payload=payload)


async def ask(policy: Policy, call: Call | None = None) -> Verdict:
    pipeline = Pipeline([policy])
    async with pipeline.admit(call or Told()) as admission:
        return await admission.admit(pipeline.core)


async def assert_outage_policies_hold(store: RedisStore) -> None:
    """While ``store`` is gone, callers see what each policy declares, whichever of the two it is."""
    assert await ask(RateLimitPolicy(store, "5/minute")) is PROCEED
    assert await ask(RateLimitPolicy(store, "5/minute", on_outage="open")) is PROCEED
    refused = await ask(RateLimitPolicy(store, "5/minute", on_outage="closed"))
    assert isinstance(refused, Reject)
    assert refused.reason is Reason.STORE_UNAVAILABLE
    refused = await ask(IdempotencyPolicy(store))
    assert isinstance(refused, Reject)
    assert refused.reason is Reason.STORE_UNAVAILABLE
    assert await ask(IdempotencyPolicy(store, on_outage="open")) is PROCEED


async def assert_dead_costs_nothing(store: RedisStore) -> None:
    """A thousand calls of each kind to a server known to be gone take far less than one deadline."""

    async def acquires() -> float:
        took, results = await timed(
            asyncio.gather(*(acquire(store, str(n)) for n in range(1000)), return_exceptions=True)
        )
        assert {type(result).__name__ for result in results} == {"StoreUnavailableError"}
        return took

    async def claims() -> float:
        took, results = await timed(
            asyncio.gather(*(claim(store, str(n)) for n in range(1000)), return_exceptions=True)
        )
        assert {type(result).__name__ for result in results} == {"StoreUnavailableError"}
        return took

    assert await best_of_three(acquires) < LIMIT_TIMEOUT
    assert await best_of_three(claims) < RECORD_TIMEOUT / 2


async def until(seen: Callable[[], bool], within: float) -> None:
    """Wait for what another process or a task in the background does."""
    async with asyncio.timeout(within):
        while not seen():  # noqa: ASYNC110 - the other process sets no event of ours
            await asyncio.sleep(0.005)


def heard(caplog: pytest.LogCaptureFixture, text: str) -> int:
    """Count the lines of the stores' own log that say ``text``; policies log what they do of it."""
    stores = [record for record in caplog.records if "stores" in record.pathname]
    return sum(text in record.getMessage() for record in stores)


async def assert_recovers_unasked(store: RedisStore, caplog: pytest.LogCaptureFixture) -> None:
    """The store finds the server again without being called; then its very first call is answered."""
    await until(lambda: heard(caplog, "available again") == 1, within=RECOVERY)
    assert (await acquire(store)).allowed
    assert isinstance(await claim(store, "after"), Claimed)
    assert heard(caplog, "is not available") == 1
    assert heard(caplog, "available again") == 1


async def until_answered(store: RedisStore, subject: str = "anyone", within: float = RECOVERY) -> None:
    """Call until the store answers."""
    async with asyncio.timeout(within):
        while True:
            with suppress(ResilienceError):
                await acquire(store, subject)
                return
            await asyncio.sleep(0.01)


class Peer(asyncio.Protocol):
    """A TCP server that is no Redis. What it does with a connection is what its kind is."""

    def __init__(self, peers: list["Peer"]) -> None:
        peers.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport


class Mute(Peer):
    """Accepts and never answers."""


class Slammer(Peer):
    """Closes each connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.abort()


class Web(Peer):
    """Talks HTTP."""

    def data_received(self, _data: bytes) -> None:
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


class Babbler(Peer):
    """Answers as a Redis until the connection is set up, then talks nonsense."""

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"\x00nonsense\r\n" if b"EVALSHA" in data or b"PX" in data else answers(data, "7.0.0"))


class Antique(Peer):
    """A Redis of version 5."""

    def data_received(self, data: bytes) -> None:
        self.transport.write(answers(data, "5.0.14"))


def answers(data: bytes, version: str) -> bytes:
    """Return what a Redis of ``version`` answers to the commands that open a connection."""
    reader = hiredis.Reader()
    reader.feed(data)
    sent = b""
    info = f"# Server\r\nredis_version:{version}\r\nrole:master\r\nmaxmemory_policy:noeviction\r\n"
    while (command := reader.gets()) is not False:
        sent += f"${len(info)}\r\n{info}\r\n".encode() if command[0] == b"INFO" else b"+OK\r\n"
    return sent


@asynccontextmanager
async def serving(kind: type[Peer]) -> AsyncIterator[tuple[str, list[Peer]]]:
    """Serve a peer; give its URL, and one object for each connection that it got."""
    peers: list[Peer] = []
    server = await asyncio.get_running_loop().create_server(lambda: kind(peers), "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", peers
        for peer in peers:
            peer.transport.abort()
        await asyncio.sleep(0)


def open_sockets() -> set[str]:
    """Return the sockets that this process holds open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them is gone by now
            found.add(str(entry.readlink()))
    return {name for name in found if name.startswith("socket:")}
