"""What this library adds to one gRPC call, beside its peers: process CPU, in one run, in turns.

Run it with ``.venv/bin/python -m benchmarks.grpc``, or ``--quick``. A whole RPC costs some 300 us of CPU at both ends,
and its noise is larger than what an interceptor adds. So the handlers are called as the server calls them, but without
one: with a context that costs nothing. What the real context adds to that, and whole RPCs over loopback, stand in
tables of their own. Over loopback everybody's added cost is a few times higher: between two calls grpc's own work has
pushed an interceptor's out of the processor's caches. Ratios hold within one run only.
"""

import argparse
import asyncio
import gc
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from time import process_time
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2
from grpc_interceptor.server import AsyncServerInterceptor
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracerProvider

from benchmarks.grpc_free import Details, FreeContext, Pair, Watched
from benchmarks.grpc_loopback import CREATE, context_costs, create_handler, over_loopback
from benchmarks.http import Budget
from benchmarks.report import Bar, Panel, Row, Section, Table
from examples.payments.v1 import payments_pb2 as pb
from grpc_interceptors import ResilienceInterceptor
from resilience import IdempotencyPolicy, MemoryStore, Pipeline, Policy, RateLimitPolicy, Selective

MANY = 1_000_000_000
CALLERS = 1000
CHECK = "/grpc.health.v1.Health/Check"
PEERS = [f"ipv4:10.0.{number >> 8}.{number & 255}:5000" for number in range(CALLERS)]
REQUEST = pb.CreatePaymentRequest(amount=100, currency="EUR")
_METADATA = (
    Pair("user-agent", "grpc-python-asyncio/1.85.1 grpc-c/54.0.0 (linux; chttp2)"),
    Pair("x-correlation-id", "0af7651916cd43dd8448eb211c80319c"),
)
_numbers = count()  # of the whole run: a new idempotency key must be new in every round

BARE, NOTHING, CONTEXT, LIMIT = "bare handler", "+ no policy", "+ context", "+ limit"
UNKEYED, NEW, REPLAY = "+ keys, none sent", "+ keys, a new one", "+ keys, a replay"
TWO, ALL, BY_KEY = "+ context, limit", "+ all four policies", "+ all four, callers with an API key"
HEALTH = "+ all four, a health check (exempt)"
THROUGH, TELEMETRY = "grpc-interceptor, one that does nothing", "OpenTelemetry, its SDK, no exporter"
EXTRA = {BY_KEY: "x-api-key", NEW: "new", REPLAY: "old"}


class Through(AsyncServerInterceptor):
    """What grpc-interceptor itself costs: passes every call on."""

    async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:
        """Call the handler."""
        return await super().intercept(method, request_or_iterator, context, method_name)


class Candidate:
    """What is measured: a chain of interceptors over one handler.

    Args:
        interceptors: from the outside in.
        extra: what else each call carries: ``""``; ``"x-api-key"``, one for each caller; ``"new"`` or ``"old"``, an
            idempotency key that nobody, or the same caller, sent before.
        method: which is called.
    """

    def __init__(self, interceptors: Sequence[Any] = (), *, extra: str = "", method: str = CREATE) -> None:
        self.interceptors = tuple(interceptors)
        self._extra = extra
        self._method = method
        self._handler = create_handler() if method == CREATE else _health_handler()
        self._find: Any = self._registered
        for interceptor in reversed(self.interceptors):
            self._find = _link(interceptor, self._find)

    async def _registered(self, _details: Details) -> Any:
        return self._handler

    def call(self) -> tuple[Details, FreeContext]:
        """Return the next call: callers come in turns, told apart by their addresses."""
        number = next(_numbers)
        metadata = (*_METADATA, *_extra(self._extra, number))
        return Details(self._method, metadata), FreeContext(PEERS[number % CALLERS], metadata)

    async def run(self, details: Details, context: Any) -> bytes:
        """Do what the server does for one call, from finding the handler to the reply's bytes."""
        handler = await self._find(details)
        reply = await handler.unary_unary(REQUEST, context)
        data: bytes = handler.response_serializer(reply)
        return data


def _link(interceptor: Any, inner: Any) -> Any:
    async def find(details: Details) -> Any:
        return await interceptor.intercept_service(inner, details)

    return find


def _extra(kind: str, number: int) -> tuple[Pair, ...]:
    match kind:
        case "x-api-key":
            return (Pair("x-api-key", f"secret-{number % CALLERS}"),)
        case "new":
            return (Pair("idempotency-key", f"new-{number}"),)
        case "old":
            return (Pair("idempotency-key", f"old-{number % CALLERS}"),)
        case _:
            return ()


def _health_handler() -> "grpc.RpcMethodHandler[Any, Any]":
    reply = health_pb2.HealthCheckResponse(status=1)

    async def check(_request: Any, _context: Any) -> Any:
        return reply

    serialize = health_pb2.HealthCheckResponse.SerializeToString
    return grpc.unary_unary_rpc_method_handler(check, None, serialize)


def guard(row: str) -> ResilienceInterceptor:
    """Return the interceptor of one of our rows."""
    store = MemoryStore()
    core: list[Policy] = []
    if row not in (NOTHING, CONTEXT, UNKEYED, NEW, REPLAY):
        core.append(RateLimitPolicy(store, f"{MANY}/minute"))
    if row not in (NOTHING, CONTEXT, LIMIT, TWO):
        core.append(Selective(IdempotencyPolicy(store), [CREATE]))
    alone = row in (NOTHING, LIMIT, UNKEYED, NEW, REPLAY)
    return ResilienceInterceptor(Pipeline(core, edge=() if alone else None))


def candidates() -> dict[str, Candidate]:
    """Return ours and theirs."""
    telemetry: Any = aio_server_interceptor  # has no types
    found = {BARE: Candidate()}
    for row in (NOTHING, CONTEXT, LIMIT, UNKEYED, NEW, REPLAY, TWO, ALL, BY_KEY):
        found[row] = Candidate([guard(row)], extra=EXTRA.get(row, ""))
    found[HEALTH] = Candidate([guard(HEALTH)], method=CHECK)
    found[THROUGH] = Candidate([Through()])
    found["grpc-interceptor, four that do nothing"] = Candidate([Through() for _ in range(4)])
    found["OpenTelemetry, its API alone"] = Candidate([telemetry(NoOpTracerProvider())])
    found[TELEMETRY] = Candidate([telemetry(TracerProvider())])
    return found


async def measure(found: Mapping[str, Candidate], *, rounds: int, calls: int) -> dict[str, float]:
    """Return the CPU microseconds of one call of each: the best decile of its rounds, after one that doesn't count."""
    seen: dict[str, list[float]] = {name: [] for name in found}
    gc.collect()
    gc.freeze()  # what a library holds from its import on is nobody else's garbage to walk
    for turn in range(rounds + 1):
        print(f"\r  in process: round {turn} of {rounds} ", end="", file=sys.stderr, flush=True)
        for name, candidate in found.items():
            given = [candidate.call() for _ in range(calls)]
            started = process_time()
            for details, context in given:
                await candidate.run(details, context)
            if turn:
                seen[name].append((process_time() - started) / calls * 1e6)
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    return {name: sorted(figures)[len(figures) // 10] for name, figures in seen.items()}


async def asked_of_context(candidate: Candidate) -> tuple[Counter[str], tuple[tuple[str, str], ...]]:
    """Return what one call asks of its context, how often, and the trailers it leaves."""
    details, context = candidate.call()
    watched = Watched(context)
    await candidate.run(details, watched)
    return watched.asked, tuple(context.trailers)


def show(title: str, unit: str, table: Mapping[str, float], *, ratio: bool = False) -> None:
    """Print one table; its first row is the base of the others."""
    base = next(iter(table.values()))
    print(f"{title:52}{unit:>8}{'added':>8}{'x' if ratio else '':>7}")
    for name, figure in table.items():
        print(f"  {name:50}{figure:8.2f}{figure - base:8.2f}{f'{figure / base:7.2f}' if ratio else ''}")
    print()


class Found(NamedTuple):
    """All tables: calls in process, what is asked of the real context and what that costs, RPCs over loopback."""

    table: dict[str, float]
    asked: Counter[str]
    costs: dict[str, float]
    wire: dict[str, float]

    @property
    def real(self) -> float:
        """Microseconds of the real context, in one call."""
        return sum(times * self.costs[name] for name, times in self.asked.items())


async def collect(*, quick: bool) -> Found:
    """Measure."""
    found = candidates()
    table = await measure(found, rounds=20 if quick else 80, calls=200)
    asked, trailers = await asked_of_context(found[ALL])
    costs = await context_costs(asked, trailers, rounds=50 if quick else 200)
    chains = {name: found[name].interceptors for name in (BARE, THROUGH, NOTHING, CONTEXT, ALL, TELEMETRY)}
    wire = await over_loopback(chains, rounds=4 if quick else 25, calls=800, tasks=16)
    return Found(table, asked, costs, wire)


def _reported(title: str, table: Mapping[str, float]) -> Table:
    base = next(iter(table.values()))
    rows = [Row(name, (figure, figure - base, figure / base)) for name, figure in table.items()]
    return Table(title, ("CPU µs", "added", "x bare"), tuple(rows))


def _panel(table: Mapping[str, float]) -> Panel:
    whose: dict[str, Any] = {ALL: "ours", "grpc-interceptor, four that do nothing": "peer", TELEMETRY: "peer"}
    names = {ALL: "ours, all four policies"}
    bars = [Bar(names.get(name, name), table[name] - table[BARE], whose[name]) for name in whose]
    return Panel(
        "Interceptors around one unary gRPC call, counts in memory", "µs of CPU added to each call", tuple(bars)
    )


async def run(*, quick: bool) -> Section:
    """Measure, for a report."""
    found = await collect(quick=quick)
    context = [Row(name, (found.costs[name], float(times))) for name, times in found.asked.items()]
    tables = (
        _reported("One unary call, in process, a context that is free", found.table),
        Table("What all four policies ask of the real context", ("CPU µs", "times"), tuple(context)),
        _reported("Whole RPCs over loopback, 16 at once: the server", found.wire),
    )
    table = found.table
    held = {"grpc.all": table[ALL] - table[BARE], "grpc.unkeyed": table[ALL] - table[TWO]}
    return Section("gRPC", tables, held, (_panel(table),))


async def main(*, quick: bool) -> None:
    """Measure and print."""
    print(
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, grpcio {grpc.__version__}\n"
    )
    table, asked, costs, wire = found = await collect(quick=quick)
    show("one unary call, in process, a context that is free", "CPU us", table)

    print(f"{'what all four policies ask of the real context':52}{'CPU us':>8}{'times':>8}")
    for name, times in asked.items():
        print(f"  {name:50}{costs[name]:8.2f}{times:8}")
    print(f"  {'together':50}{found.real:8.2f}\n")

    show("whole RPCs over loopback, 16 at once: the server", "CPU us", wire, ratio=True)

    print(f"{'budgets for gRPC':70}{'bound':>9}{'found':>9}")
    of_all = table[ALL] - table[BARE]
    print(Budget("all four policies, memory store, added to one gRPC call: us", True, 15, of_all).line())
    print(Budget("the same, with what the real context costs: us", True, 15, of_all + found.real).line())
    print(Budget("a call without a key to a keyed method: us", True, 1, table[ALL] - table[TWO]).line())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under half a minute")
    asyncio.run(main(quick=parser.parse_args().quick))
