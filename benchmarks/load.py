"""The payments service under load over sockets: bare, guarded with its memory, guarded with Redis; by turns.

Run it with ``python -m benchmarks.load``, or ``--quick``. Each service is a process, so is each client: wrk and vegeta
for HTTP, ghz for gRPC. First all connections ask as fast as they are answered; then requests come at a fixed rate, the
same for all services, whether or not the earlier ones were answered: that is what latency is told of.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.load_clients import (
    CONNECTIONS,
    Round,
    Target,
    ToolError,
    grpc_at_fixed_rate,
    grpc_at_full_speed,
    http_at_fixed_rate,
    http_at_full_speed,
)
from benchmarks.report import Row, Section, Table, as_text
from tests.support.redis_servers import RedisServer, binaries

BARE, MEMORY, REDIS = "bare service", "+ guard, memory", "+ guard, Redis"
COLUMNS = ("req/s", "x bare", "CPU µs", "p50 ms", "p99 ms", "p99.9 ms", "CPU µs/fixed", "stall ms")
# The fixed rate is so much of what the bare service serves, but no more than so much of what the slowest one serves:
# latency beyond that tells of nothing but the queue.
_SHARE, _MOST = 0.5, 0.7
_START = 30.0  # Seconds that a start may take.
_STOP = 20.0  # Seconds that a stop may take.


class Case(NamedTuple):
    """A call that is made again and again, and the clients that make it."""

    title: str
    keyed: bool
    full_speed: Callable[..., Awaitable[Round]]
    fixed_rate: Callable[..., Awaitable[Round]]


CASES = (
    Case("GET a payment, HTTP", False, http_at_full_speed, http_at_fixed_rate),
    Case("POST a payment under a new key, HTTP", True, http_at_full_speed, http_at_fixed_rate),
    Case("GetPayment, gRPC", False, grpc_at_full_speed, grpc_at_fixed_rate),
    Case("CreatePayment under a new key, gRPC", True, grpc_at_full_speed, grpc_at_fixed_rate),
)


class Plan(NamedTuple):
    """How long to measure: rounds by turns, and the seconds of each."""

    rounds: int
    warm: float
    full: float
    fixed: float


WHOLE, QUICK = Plan(3, 0.5, 1.0, 3.0), Plan(1, 0, 0.7, 0.8)


class Service:
    """A running service: one process of ``benchmarks.load_server``."""

    target: Target

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def tell(self) -> dict[str, float]:
        """Return what the process did so far."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the service has no pipes")
        stdin.write(b"\n")
        told: dict[str, float] = json.loads(await stdout.readline() or b"null")
        if told is None:
            raise RuntimeError(f"the service ended: {self.complaints()[-1:]}")
        return told

    def complaints(self) -> list[str]:
        """Return what the process logged: warnings and worse."""
        return self._log.read_text(errors="replace").splitlines()


@asynccontextmanager
async def start(log: Path, *arguments: str) -> AsyncIterator[Service]:
    """Start a service; end it at the end of the block."""
    command = [sys.executable, "-m", "benchmarks.load_server", *arguments]
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=Path(__file__).parents[1],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the service has no pipes")
        service = Service(process, log)
        line = await asyncio.wait_for(stdout.readline(), _START)
        if not line:
            raise RuntimeError(f"the service did not start: {service.complaints()[-1:]}")
        service.target = Target(**json.loads(line))
        yield service
        stdin.close()
        await asyncio.wait_for(process.wait(), _STOP)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass
class Seen:
    """All rounds of one service in one case."""

    full: list[Round] = field(default_factory=list)
    fixed: list[Round] = field(default_factory=list)
    full_cpu: list[float] = field(default_factory=list)
    fixed_cpu: list[float] = field(default_factory=list)
    stall: float = 0.0
    resident: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second at full speed."""
        return median(one.rate for one in self.full)

    @property
    def note(self) -> str:
        """What the figures leave out: memory, and whatever went wrong."""
        return "; ".join([f"{self.resident / 2**20:.0f} MB", *self.faults])

    def figures(self, bare: "Seen") -> tuple[float | None, ...]:
        """Return one figure for each column, medians of the rounds but for the stall, which is the worst."""
        full = (self.rate, self.rate / bare.rate, median(self.full_cpu))
        if not self.fixed:
            return (*full, None, None, None, None, None)
        quantiles = [median(one.quantile(share) * 1e3 for one in self.fixed) for share in (0.5, 0.99, 0.999)]
        return (*full, *quantiles, median(self.fixed_cpu), self.stall * 1e3)


async def watched(service: Service, client: Awaitable[Round], seen: Seen, *, keyed: bool, spare: int) -> Any:
    """Run a client; return what it saw, the service's CPU µs a request and its longest stall, and note what is wrong.

    Args:
        service: that the client asks.
        client: to run.
        seen: takes the notes.
        keyed: whether each request that was answered must have taken a payment.
        spare: so many payments more may have been taken: of requests whose answers the client did not wait for.
    """
    before = await service.tell()
    one = await client
    after = await service.tell()
    if one.failed:
        seen.faults.append(f"{one.failed} of {one.sent} FAILED")
    taken = after["payments"] - before["payments"]
    most = one.sent + spare if keyed else 0
    if not (one.sent - one.failed if keyed else 0) <= taken <= most:
        seen.faults.append(f"{one.sent} requests took {taken:.0f} PAYMENTS")
    seen.resident = after["resident"]
    return one, (after["cpu"] - before["cpu"]) / max(one.sent, 1) * 1e6, after["stall"]


async def measure(case: Case, services: Mapping[str, Service], plan: Plan) -> Table:
    """Measure one case; say why there is nothing where a tool is missing."""
    seen = {name: Seen() for name in services}
    keyed = case.keyed
    rate, note = 0, ""
    try:
        for turn in range(plan.rounds + (plan.warm > 0)):
            warming = plan.warm > 0 and turn == 0
            for name, service in services.items():
                progress(f"{case.title}: full speed, {name}, round {turn}")
                client = case.full_speed(service.target, keyed=keyed, seconds=plan.warm if warming else plan.full)
                one, cpu, _ = await watched(service, client, seen[name], keyed=keyed, spare=CONNECTIONS)
                if not warming:
                    seen[name].full.append(one)
                    seen[name].full_cpu.append(cpu)
        rate = round(min(_SHARE * seen[BARE].rate, *(_MOST * one.rate for one in seen.values())))
        for turn in range(plan.rounds):
            for name, service in services.items():
                progress(f"{case.title}: {rate} a second, {name}, round {turn + 1}")
                client = case.fixed_rate(service.target, keyed=keyed, rate=rate, seconds=plan.fixed)
                one, cpu, stall = await watched(service, client, seen[name], keyed=keyed, spare=0)
                seen[name].fixed.append(one)
                seen[name].fixed_cpu.append(cpu)
                seen[name].stall = max(seen[name].stall, stall)
    except ToolError as error:
        note = str(error)
    if not seen[BARE].full:
        return Table(case.title, COLUMNS, (Row(BARE, (), note),))
    rows = [Row(name, one.figures(seen[BARE]), one.note) for name, one in seen.items() if one.full]
    told = f"req/s, CPU µs: {CONNECTIONS} at once, full speed. The rest: {rate:,} a second to each."
    return Table(case.title, COLUMNS, tuple(rows), note or told)


def progress(text: str) -> None:
    """Tell how far it is."""
    print(f"\r  {text:76}", end="", file=sys.stderr, flush=True)


async def run(*, quick: bool) -> Section:
    """Start the services and measure every case."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        services = {BARE: await stack.enter_async_context(start(folder / "bare", "bare"))}
        services[MEMORY] = await stack.enter_async_context(start(folder / "memory", "guarded"))
        path = next(iter(binaries().values()), None)
        if path is not None:
            redis = await stack.enter_async_context(RedisServer(path))
            services[REDIS] = await stack.enter_async_context(start(folder / "redis", "guarded", redis.url))
        tables = [await measure(case, services, QUICK if quick else WHOLE) for case in CASES]
        for name, service in services.items():
            if complaints := service.complaints():
                logged = Row(name, (), f"{len(complaints)} lines; the first: {complaints[0][:200]}")
                tables.append(Table("Logged under load", (), (logged,)))
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    return Section("Load: the payments service over sockets", tuple(tables), {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round: half a minute")
    for table in asyncio.run(run(quick=parser.parse_args().quick)).tables:
        print(as_text(table))
