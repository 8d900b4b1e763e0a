"""What a handler of the matrix does, on the loop and in a thread, and what became of its call."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import grpc

from resilience import PROCEED, Admission, Call, Outcome, Verdict, get_correlation_id
from tests.integration.grpc_world import SECRET

_BOUND = 20.0  # Seconds that any one wait may take.


@dataclass
class Life:
    """What became of the calls of one correlation id, and what they wait for."""

    runs: int = 0
    ended: list[str] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    thread_gate: threading.Event = field(default_factory=threading.Event)

    def enter(self) -> None:
        self.runs += 1
        self.entered.set()

    def release(self) -> None:
        self.gate.set()
        self.thread_gate.set()


class World:
    """All calls by their correlation ids; a policy that sees each of them end."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.lives: dict[str, Life] = {}
        self.open = 0
        self.quiet = asyncio.Event()

    def life(self, name: str) -> Life:
        return self.lives.setdefault(name, Life())

    def mine(self) -> Life:
        """Return the life of the running call, in whichever thread that runs."""
        return self.life(str(get_correlation_id()))

    async def admit(self, _call: Call, admission: Admission) -> Verdict:
        life = self.mine()
        self.open += 1
        self.quiet.clear()

        async def settle(outcome: Outcome) -> None:
            life.ended.append(outcome.ended)
            life.settled.set()
            self.open -= 1
            if self.open == 0:
                self.quiet.set()

        admission.on_settle(settle)
        return PROCEED


AsyncAct = Callable[[World, Any], Awaitable[bytes]]
SyncAct = Callable[[World, Any], bytes]


async def oks(world: World, _context: Any) -> bytes:
    world.mine().enter()
    return b"done"


async def aborts(world: World, context: Any) -> bytes:
    world.mine().enter()
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Not yet")
    raise AssertionError("abort returned")


async def raises(_world: World, _context: Any) -> bytes:
    raise ValueError(SECRET)


async def sets_code(world: World, context: Any) -> bytes:
    world.mine().enter()
    context.set_code(grpc.StatusCode.NOT_FOUND)
    context.set_details("Nothing there")
    return b""


async def leaks(_world: World, _context: Any) -> bytes:
    inner = asyncio.ensure_future(asyncio.Event().wait())
    inner.cancel()
    await inner
    raise AssertionError("the inner task was cancelled")


async def waits(world: World, _context: Any) -> bytes:
    life = world.mine()
    life.enter()
    try:
        await asyncio.wait_for(life.gate.wait(), _BOUND)
    except asyncio.CancelledError:
        life.cut.set()
        raise
    return b"done"


def _enter(world: World) -> Life:
    life = world.mine()
    world.loop.call_soon_threadsafe(life.enter)
    return life


def sync_oks(world: World, _context: Any) -> bytes:
    _enter(world)
    return b"done"


def sync_aborts(world: World, context: Any) -> bytes:
    _enter(world)
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Not yet")
    raise AssertionError("abort returned")


def sync_raises(_world: World, _context: Any) -> bytes:
    raise ValueError(SECRET)


def sync_sets_code(world: World, context: Any) -> bytes:
    _enter(world)
    context.set_code(grpc.StatusCode.NOT_FOUND)
    context.set_details("Nothing there")
    return b""


def sync_leaks(_world: World, _context: Any) -> bytes:
    inner: Future[bytes] = Future()
    inner.cancel()
    return inner.result()


def sync_waits(world: World, context: Any) -> bytes:
    life = _enter(world)
    keyed = "idempotency-key" in dict(context.invocation_metadata())
    if not keyed and not context.add_callback(life.thread_gate.set):
        life.thread_gate.set()
    assert life.thread_gate.wait(_BOUND)
    if not context.is_active():
        world.loop.call_soon_threadsafe(life.cut.set)
    return b"done"


ACTS: dict[str, tuple[AsyncAct, SyncAct]] = {
    "oks": (oks, sync_oks),
    "aborts": (aborts, sync_aborts),
    "raises": (raises, sync_raises),
    "sets_code": (sets_code, sync_sets_code),
    "leaks": (leaks, sync_leaks),
    "waits": (waits, sync_waits),
}
