"""What the ground functions cost by themselves: CPU microseconds a call, in one run, in turns.

Run it with ``python -m benchmarks.decisions``. No store, no loop but where a table says so; the bare baseline is an
empty function.
"""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from time import process_time, thread_time

from benchmarks.decision_peers import DECISION_PEERS
from benchmarks.report import Row, Section, Table, as_text
from resilience import MemoryStore, Quota
from resilience.decisions import sliding_window, token_bucket
from resilience.decisions.fingerprint import fingerprint, fingerprint_of_values
from resilience.stores.base import Want
from resilience.stores.record import pack, unpack
from resilience.verdict import Reply

CALLS = 2000
CALLERS = 1000
MANY = 1_000_000_000
EMPTY = "an empty function"
ABSENT = "not installed: ./dev bench sets it up"
JSON = b'{"name":"Anvil","price":12.5,"tags":["iron","heavy"]}'
_REPLY = Reply("http", 201, (("content-type", "application/json"),), b'{"id":"pay_1","amount":100}')
_TOKEN, _FINGERPRINT = b"t" * 16, b"http:" + b"f" * 32

Act = Callable[[], object]
Hit = Callable[[int], Awaitable[object]]


def _sliding(limit: int, units: int) -> Act:
    """Return a decision on a window that holds ``units`` units in each of its parts."""
    quota, marks, clock = Quota(limit, per=60), sliding_window.empty(), count()
    for second in range(120):
        if units:
            sliding_window.take(marks, quota, units, second)

    def act() -> object:
        return sliding_window.take(marks, quota, 1, 120 + next(clock) / 1e6)

    return act


def _bucket() -> Act:
    quota, full, clock = Quota(1000, per=1, algorithm="token_bucket", burst=1000), token_bucket.empty(), count()

    def act() -> object:
        now = next(clock) / 100
        usage = token_bucket.decide(full, quota, 1, now)
        token_bucket.charge(full, quota, 1, now)
        return usage

    return act


def _claim() -> bytes:
    return pack(done=False, token=_TOKEN, fingerprint=_FINGERPRINT, ttl=86400.0, lease=30.0)


def _record() -> bytes:
    return pack(done=True, token=_TOKEN, fingerprint=_FINGERPRINT, ttl=86400.0, reply=_REPLY)


def acts() -> dict[str, Act]:
    """Return what is measured."""
    claim, record = _claim(), _record()
    values = {"amount": 100, "currency": "EUR", "to": ("acct_1", "acct_2")}
    return {
        EMPTY: lambda: None,
        "sliding window, few units": _sliding(MANY, 0),
        "sliding window, all its parts in use": _sliding(MANY, 10),
        "sliding window, a denial": _sliding(100, 10),
        "token bucket": _bucket(),
        "fingerprint of 54 bytes of JSON": lambda: fingerprint("http", "/things", JSON),
        "fingerprint of 54 bytes that are no JSON": lambda: fingerprint("http", "/things", b"x" * len(JSON)),
        "fingerprint of 10 KiB that are no JSON": lambda: fingerprint("http", "/things", b"x" * 10240),
        "fingerprint of an operation's values": lambda: fingerprint_of_values(values),
        "idempotency record, pack a claim": _claim,
        "idempotency record, pack a reply": _record,
        "idempotency record, unpack a claim": lambda: unpack(claim),
        "idempotency record, unpack a reply": lambda: unpack(record),
    }


def measure(found: Mapping[str, Act], rounds: int) -> dict[str, float]:
    """Return the least CPU microseconds a call of each, measured in turns."""
    least = dict.fromkeys(found, float("inf"))
    for turn in range(rounds):
        print(f"\r  ground functions: round {turn + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
        for name, act in found.items():
            started = thread_time()
            for _ in range(CALLS):
                act()
            least[name] = min(least[name], (thread_time() - started) / CALLS * 1e6)
    return least


def hits() -> tuple[dict[str, Hit], list[Row]]:
    """Return a whole decision in memory, ours and theirs, and what is not installed."""
    store, quota = MemoryStore(), Quota(MANY, per=60)
    names = [f"c{number}" for number in range(CALLERS)]

    async def nothing(_number: int) -> None:
        """Do nothing, as the cheapest coroutine does."""

    bucket = Quota(100_000, per=1, algorithm="token_bucket", burst=100_000)
    found: dict[str, Hit] = {
        "an empty coroutine": nothing,
        "ours, sliding window": lambda n: store.acquire([Want("s", names[n % CALLERS], quota, 1)]),
        "ours, token bucket": lambda n: store.acquire([Want("b", names[n % CALLERS], bucket, 1)]),
    }
    missing = []
    for peer in DECISION_PEERS:
        try:
            hit = peer.open(None)
        except ImportError:
            missing.append(Row(f"{peer.distribution} {peer.way}", note=ABSENT))
            continue
        found[peer.name] = lambda n, hit=hit: hit(names[n % CALLERS])  # type: ignore[misc]
    return found, missing


async def measure_hits(found: Mapping[str, Hit], rounds: int) -> dict[str, float]:
    """Return the least CPU microseconds a decision of each, measured in turns."""
    least = dict.fromkeys(found, float("inf"))
    numbers = count()
    for turn in range(rounds):
        print(f"\r  decisions in memory: round {turn + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
        for name, hit in found.items():
            started = process_time()
            for _ in range(CALLS):
                await hit(next(numbers))
            least[name] = min(least[name], (process_time() - started) / CALLS * 1e6)
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    return least


async def run(*, quick: bool) -> Section:
    """Measure."""
    gc.collect()
    gc.freeze()
    rounds = 10 if quick else 40
    found = measure(acts(), rounds)
    ground = tuple(Row(name, (figure, figure - found[EMPTY])) for name, figure in found.items())
    chosen, missing = hits()
    decided = await measure_hits(chosen, rounds // 2)
    ours = decided["ours, sliding window"]
    rows = tuple(Row(name, (figure, figure / ours)) for name, figure in decided.items())
    return Section(
        "Decisions",
        (
            Table("Ground functions", ("CPU µs", "added"), ground),
            Table(f"A decision in memory, {CALLERS} callers", ("CPU µs", "x ours"), (*rows, *missing)),
        ),
        {},
    )


if __name__ == "__main__":
    for _table in asyncio.run(run(quick=False)).tables:
        print(as_text(_table))
