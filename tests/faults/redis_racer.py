"""One of several processes that race in Redis. Says "ready", waits for a line, runs, prints what it saw as JSON."""

import asyncio
import json
import sys
from time import monotonic

from resilience import Quota, Reply
from resilience.decisions.idempotency import Claimed, Completed
from resilience.stores.base import Want
from resilience.stores.redis import RedisStore

RACE = Want("race", "everyone", Quota(1000, per=3600), 1)
SHORT_LIMIT, SHORT_WINDOW, SHORT_RUN = 50, 0.5, 3.0
SHORT = Want("short", "everyone", Quota(SHORT_LIMIT, per=SHORT_WINDOW), 1)


async def limit(store: RedisStore) -> int:
    """Try 300 times, ten at a time; return how many were admitted."""

    async def tries() -> int:
        return sum([(await store.acquire([RACE]))[0].allowed for _ in range(30)])

    return sum(await asyncio.gather(*(tries() for _ in range(10))))


async def window(store: RedisStore) -> list[tuple[float, float]]:
    """Try again and again for a while; return the instants between which each admission happened."""
    admitted = []
    stop = monotonic() + SHORT_RUN
    while (before := monotonic()) < stop:
        (usage,) = await store.acquire([SHORT])
        if usage.allowed:
            admitted.append((before, monotonic()))
        await asyncio.sleep(min(usage.retry_after, 0.02))
    return admitted


async def claim(store: RedisStore) -> tuple[int, str]:
    """Want one operation done; return how often this process ran it, and the reply it got."""
    token, ran = f"racer-{sys.argv[3]}", 0
    async with asyncio.timeout(30):
        while True:
            answer = await store.claim("k", token, b"http:f", lease=30, ttl=60, takeover="reexecute")
            if isinstance(answer, Completed):
                assert answer.reply is not None
                return ran, answer.reply.body.decode()
            if isinstance(answer, Claimed):
                ran += 1
                await asyncio.sleep(0.05)
                assert await store.complete("k", token, b"http:f", Reply("http", 200, (), token.encode()), ttl=60)
            await asyncio.sleep(0.005)


async def main() -> None:
    """Run what the command line names."""
    store = RedisStore(sys.argv[2], limit_timeout=10, record_timeout=10)
    await store.reset("warm", "up")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(json.dumps(await {"limit": limit, "window": window, "claim": claim}[sys.argv[1]](store)), flush=True)
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main())
