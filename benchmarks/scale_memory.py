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
PATIENCE = {True: 5.0, False: 40.0}
"""Seconds that one row may take: if quick, and if not."""
QUOTA = Quota(1000, per=60)
OURS, DICT, PEER = "ours", "dict", "peer"
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


OPEN = {OURS: _ours, DICT: _dict, PEER: _peer}
NAMES = {OURS: "ours", DICT: "a dict of integers", PEER: DECISION_PEERS[0].distribution}


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


async def _be_one(name: str, keys: int, bound: int) -> list[float | None]:
    # A thousand keys are less than an allocator's grain, so that many stores are filled and held.
    many = max(1, 100_000 // keys)
    hits = [OPEN[name](bound) for _ in range(many)]
    gc.collect()
    before = _resident()
    filling = sum([await _fill(hit, keys) for hit in hits])
    grown = _resident() - before
    known = await _known(hits[0], keys) if bound >= keys else None  # else nobody can tell who is still known
    each, held = (grown / (min(bound, keys) * many), grown / many / 2**20) if grown else (None, None)
    return [filling / keys / many * 1e6, known, each, held]


async def _known(hit: Hit, keys: int) -> float:
    chosen = random.Random(1)  # noqa: S311 - the same order each time
    callers = [f"caller-{chosen.randrange(keys)}" for _ in range(HITS)]
    started = process_time()
    for caller in callers:
        await hit(caller)
    return (process_time() - started) / HITS * 1e6


async def _start(name: str, keys: int, bound: int, patience: float) -> Row:
    title = f"{NAMES[name]}, {keys:,} callers" + (f", of which {bound:,} are held" if bound < keys else "")
    command = [sys.executable, "-m", __name__, name, str(keys), str(bound)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(patience):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return Row(title, note=f"not done in {patience:g} s")
    if process.returncode:
        return Row(title, note="not installed: ./dev bench sets it up")
    return Row(title, tuple(json.loads(said)))


async def measure(*, quick: bool, keys: int) -> Table:
    """Measure up to ``keys`` callers, in steps of ten."""
    steps = [10**power for power in range(3, 10) if 10**power <= keys]
    bound = BOUND // 10 if quick else BOUND
    plan = [(DICT, bound, bound), *((OURS, step, step) for step in steps)]
    plan += [(OURS, 3 * bound, bound), (PEER, bound, bound)]
    patience = PATIENCE[quick] * max(1.0, keys / 1_000_000)
    rows = []
    for name, number, held in plan:
        print(f"\r  memory: {NAMES[name]}, {number:,} callers ", end="", file=sys.stderr, flush=True)
        rows.append(await _start(name, number, held, patience))
    note = "What a caller's own name takes is included. A count in 30 parts takes more: see MemoryStore."
    return Table("A count in memory", COLUMNS, tuple(rows), note)


if __name__ == "__main__":
    with suppress(ImportError):
        print(json.dumps(asyncio.run(_be_one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
        sys.exit(0)
    sys.exit(1)
