"""What ``benchmarks.idempotency`` measures, for a report."""

from contextlib import AsyncExitStack

from benchmarks.http import BARE, Table, added, cost
from benchmarks.http_report import reported
from benchmarks.idempotency import (
    CONTEXT,
    KEYED,
    LINK_SETS,
    NEW,
    OURS,
    REPLAY,
    SETS,
    floors,
    keyed,
    over_raw,
    round_trips,
)
from benchmarks.peers import fastapi_app
from benchmarks.report import Bar, Panel, Row, Section
from benchmarks.report import Table as Reported
from benchmarks.rounds import Candidate, Figure, measure
from tests.support.redis_servers import RedisServer, binaries

OURS_NEW, OURS_REPLAY = f"{OURS.distribution}, {NEW}", f"{OURS.distribution}, {REPLAY}"


async def run(*, quick: bool) -> Section:
    """Measure."""
    many, few, seconds = (12, 3, 0.1) if quick else (40, 12, 0.25)
    plain: Table = {**await measure("raw", over_raw(), rounds=many, seconds=0.02)}
    tables = [reported("Over a raw ASGI application, in memory", plain)]
    bare = {BARE: Candidate(fastapi_app())}
    async with AsyncExitStack() as stack:
        found, missing = await keyed(stack, None)
        memory: Table = {**await measure("memory", {**bare, **found}, rounds=many, seconds=0.03), **missing}
    tables.append(reported("Over a FastAPI route, in memory", memory))
    crowd: Table = {}
    trips: dict[str, float] = {}
    path = next(iter(binaries().values()), None)
    if path is not None:
        async with RedisServer(path) as server, AsyncExitStack() as stack:
            found, missing = await keyed(stack, server.url)
            candidates = {**bare, **await floors(stack, server.url), **found}
            trips = await round_trips(candidates, server.url)
            for tasks in (64,) if quick else (1, 64):
                title = f"Redis, {tasks} at once"
                crowd = {**await measure(title, candidates, rounds=few, seconds=seconds, tasks=tasks), **missing}
                tables.append(reported(f"Over a FastAPI route, {title}", crowd))
        counted = tuple(Row(name, (times,)) for name, times in trips.items())
        tables.append(Reported("Round trips to Redis for one request, counted by the server", ("reads",), counted))
    held = {
        "idempotency.new": added(crowd, OURS_NEW) if crowd else None,
        "idempotency.replay": added(crowd, OURS_REPLAY) if crowd else None,
        "idempotency.unkeyed": added(plain, f"+ {KEYED}", f"+ {CONTEXT}"),
        "new.memory": added(memory, OURS_NEW),
        "new.link": added(crowd, LINK_SETS) if crowd else None,
        "new.redis-py": added(crowd, SETS) if crowd else None,
        "new.bare": cost(crowd),
        "trips.new": trips.get(OURS_NEW),
        "trips.replay": trips.get(OURS_REPLAY),
    }
    kept = {name: figure for name, figure in held.items() if figure is not None}
    return Section("Idempotency", tuple(tables), kept, (_panel(crowd),) if crowd else ())


def _panel(crowd: Table) -> Panel:
    bars = []
    for name, figure in crowd.items():
        if isinstance(figure, Figure) and (name == BARE or name.endswith(f", {NEW}")):
            ours = name == OURS_NEW
            bars.append(
                Bar(name.removesuffix(f", {NEW}"), figure.cpu, "bare" if name == BARE else "ours" if ours else "peer")
            )
    title = "A POST with a new idempotency key to a FastAPI route, records in Redis, 64 at once"
    return Panel(title, "µs of CPU for each request, the route's own included", tuple(bars))
