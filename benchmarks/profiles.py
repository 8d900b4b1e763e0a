"""What of a guarded request's CPU time is spent where, beside the bare one's: the profiles behind HTTP's budgets.

Run it with ``.venv/bin/python -m benchmarks.profiles``. Bare and guarded take turns in one process, each under a
sampler of its own, so that the difference in what is not ours shows, too: the same code costs more between our turns.
"""

import asyncio
import gc
from contextlib import AsyncExitStack
from statistics import median

from benchmarks.http import ALL, ALONE, CONTEXT, MANY, NEW, health, ours, pipeline, raw
from benchmarks.peers import fastapi_app
from benchmarks.reasons import ALL_RAW, ALL_ROUTE, CONTEXT_RAW, LIMIT_64, NEW_64
from benchmarks.report import Row, Section, Table, as_text
from benchmarks.rounds import Candidate, one_round
from benchmarks.sampler import Place, Sampler
from http_middleware import ResilienceMiddleware
from http_middleware.routes import RouteTable
from resilience import MemoryStore
from tests.support.redis_servers import RedisServer, binaries

_OURS = ("resilience", "http_middleware", "grpc_interceptors")
_HARNESS = ("benchmarks", "__main__")
_WORTH_A_ROW = 0.5  # µs that what is not ours must have grown by, or shrunk.
_MODULES, _FUNCTIONS = 12, 6  # Of ours: how many have a row of their own, and how many the note names.


def over_raw(row: str) -> ResilienceMiddleware:
    """Return a raw ASGI application behind the policies of a row."""
    routes = RouteTable(fastapi_app().routes)
    return ResilienceMiddleware(raw, pipeline(row, MemoryStore(), MANY), routes=routes, health=health(row))


def home(module: str) -> str:
    """Return which row a module's time belongs to: its own where it is ours, else its distribution's."""
    top = module.partition(".")[0]
    return module if top in _OURS else "the harness" if top in _HARNESS else top


class Profiled:
    """A candidate, and where its time went."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.sampler = Sampler()
        self.costs: list[float] = []
        """CPU µs of one request, of each round."""

    async def turn(self, seconds: float, tasks: int) -> None:
        """Measure for one round."""
        with self.sampler:
            figure = await one_round(self.candidate, seconds, tasks)
        self.costs.append(figure.cpu)

    @property
    def cost(self) -> float:
        """CPU µs of one request."""
        return median(self.costs)

    def microseconds(self) -> dict[Place, float]:
        """Return the CPU µs of one request by function."""
        whole = sum(self.sampler.seconds.values()) or 1.0
        return {place: self.cost * seconds / whole for place, seconds in self.sampler.seconds.items()}

    def by_home(self) -> dict[str, float]:
        """Return the CPU µs of one request by row."""
        homes: dict[str, float] = {}
        for place, spent in self.microseconds().items():
            name = home(place.module)
            homes[name] = homes.get(name, 0.0) + spent
        return homes


def table(title: str, bare: Profiled, guarded: Profiled) -> Table:
    """Hold where the time of one went to where that of the other did."""
    before, after = bare.by_home(), guarded.by_home()
    mine = sorted((name for name in after if name.partition(".")[0] in _OURS), key=lambda name: -after[name])
    shown, rest = mine[:_MODULES], mine[_MODULES:]
    rows = [_row("one request", guarded.cost, bare.cost)]
    rows += [_row(f"ours: {name}", after[name], 0.0) for name in shown]
    if rest:
        rows.append(_row("ours: the other modules", sum(after[name] for name in rest), 0.0))
    theirs = sorted({*before, *after} - set(mine), key=lambda name: before.get(name, 0.0) - after.get(name, 0.0))
    grown = [name for name in theirs if abs(after.get(name, 0.0) - before.get(name, 0.0)) >= _WORTH_A_ROW]
    rows += [_row(name, after.get(name, 0.0), before.get(name, 0.0)) for name in grown]
    left = [name for name in theirs if name not in grown]
    rows.append(
        _row("all else", sum(after.get(name, 0.0) for name in left), sum(before.get(name, 0.0) for name in left))
    )
    top = sorted(guarded.microseconds().items(), key=lambda item: -item[1])
    named = [f"`{place.function}` {spent:.1f}" for place, spent in top if home(place.module) in mine][:_FUNCTIONS]
    return Table(title, ("guarded, CPU µs", "bare", "added"), tuple(rows), f"Most in: {', '.join(named)}.")


def _row(name: str, after: float, before: float) -> Row:
    return Row(name, (after, before, after - before))


async def profile(title: str, bare: Candidate, guarded: Candidate, *, rounds: int, tasks: int = 1) -> Table:
    """Measure one pair."""
    pair = Profiled(bare), Profiled(guarded)
    for one in pair:
        await one_round(one.candidate, 0.1, tasks)
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for one in pair:
            await one.turn(0.25, tasks)
    return table(title, *pair)


async def run(*, quick: bool) -> Section:
    """Measure."""
    rounds = 2 if quick else 12
    tables = [
        await profile(CONTEXT_RAW, Candidate(raw), Candidate(over_raw(CONTEXT)), rounds=rounds),
        await profile(ALL_RAW, Candidate(raw), Candidate(over_raw(ALL)), rounds=rounds),
    ]
    route = Candidate(fastapi_app())
    async with AsyncExitStack() as stack:
        guarded = Candidate(await stack.enter_async_context(ours(ALL)(MANY, None)))
        tables.append(await profile(ALL_ROUTE, route, guarded, rounds=rounds))
    path = next(iter(binaries().values()), None)
    if path is not None:
        async with RedisServer(path) as server, AsyncExitStack() as stack:
            for title, row, extra in ((LIMIT_64, ALONE, ""), (NEW_64, NEW, "new")):
                guarded = Candidate(await stack.enter_async_context(ours(row)(MANY, server.url)), extra)
                tables.append(await profile(title, route, guarded, rounds=rounds, tasks=64))
    return Section("Profiles", tuple(tables), {})


async def main() -> None:
    """Measure and print."""
    for found in (await run(quick=False)).tables:
        print(as_text(found))


if __name__ == "__main__":
    asyncio.run(main())
