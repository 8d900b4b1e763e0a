"""What one count costs in memory, from a thousand callers to ten million: each number of them in a fresh process.

``python -m benchmarks.scale_memory NAME KEYS`` is that process; ``measure`` starts it.
"""

import asyncio
import gc
import json
import random
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from resource import getpagesize
from time import process_time

from benchmarks.decision_peers import DECISION_PEERS
from benchmarks.report import Row, Table
from resilience import MemoryStore, Quota
from resilience.stores.base import Want

HITS = 50_000
BOUND = 100_000
QUOTA = Quota(1000, per=60)
OURS, DICT, PEER, FLOOD = "ours", "a dict of integers", "peer", "flood"
NEW = "µs, a new caller"
KNOWN = "µs, a known one"
COLUMNS = (NEW, KNOWN, "bytes a key", "MiB in all")

Hit = Callable[[str], Awaitable[object]]


def _ours(most: int) -> Hit:
    store = MemoryStore(max_subjects=most)
    return lambda caller: store.acquire([Want("r", caller, QUOTA, 1)])


def _dict(_most: int) -> Hit:
    counts: dict[str, int] = {}

    async def hit(caller: str) -> None:
        counts[caller] = counts.get(caller, 0) + 1

    return hit


def _peer(_most: int) -> Hit:
    return DECISION_PEERS[0].open(None)


OPEN = {OURS: _ours, DICT: _dict, PEER: _peer, FLOOD: _ours}


def _resident() -> int:
    """Return the bytes of this process that are in memory; 0 where nobody tells."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()
    return 0


async def _fill(hit: Hit, keys: int) -> float:
    started = process_time()
    for number in range(keys):
        await hit(f"caller-{number}")
    return process_time() - started


async def _be_one(name: str, keys: int) -> list[float | None]:
    # A thousand keys are less than an allocator's grain, so that many stores are filled and held.
    bound = BOUND if name == FLOOD else keys
    hits = [OPEN[name](bound) for _ in range(max(1, 100_000 // keys))]
    gc.collect()
    before = _resident()
    filling = sum([await _fill(hit, keys) for hit in hits])
    grown = _resident() - before
    chosen = random.Random(1)  # noqa: S311 - the same order each time
    held = min(bound, keys)
    callers = [f"caller-{keys - 1 - chosen.randrange(held)}" for _ in range(HITS)]
    started = process_time()
    for caller in callers:
        await hits[0](caller)
    known = (process_time() - started) / HITS * 1e6
    made = keys * len(hits)
    each = grown / (held * len(hits)) if grown else None
    return [filling / made * 1e6, known, each, grown / len(hits) / 2**20 if grown else None]


async def _start(name: str, keys: int) -> Row | None:
    command = [sys.executable, "-m", __name__, name, str(keys)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    if process.returncode:
        return None
    title = {OURS: "ours", PEER: DECISION_PEERS[0].distribution, DICT: DICT}.get(name, "ours")
    after = f", of which at most {BOUND:,} are held" if name == FLOOD else ""
    return Row(f"{title}, {keys:,} callers{after}", tuple(json.loads(said)))


async def measure(*, quick: bool, keys: int) -> Table:
    """Measure up to ``keys`` callers, in steps of ten."""
    steps = [10**power for power in range(3, 10) if 10**power <= keys]
    plan = [(DICT, BOUND), *((OURS, step) for step in steps), (FLOOD, (3 if quick else 10) * BOUND), (PEER, BOUND)]
    rows = []
    for name, number in plan:
        print(f"\r  memory: {name}, {number:,} callers ", end="", file=sys.stderr, flush=True)
        row = await _start(name, number)
        rows.append(row or Row(DECISION_PEERS[0].distribution, note="not installed: ./dev bench sets it up"))
    note = "What a key's own text takes is included. A count in 30 parts takes more: 0.7 KB at most."
    return Table("A count in memory", COLUMNS, tuple(rows), note)


if __name__ == "__main__":
    with suppress(ImportError):
        print(json.dumps(asyncio.run(_be_one(sys.argv[1], int(sys.argv[2])))))
        sys.exit(0)
    sys.exit(1)
