"""Many clients and random faults for a bounded time, and the history of it."""

import asyncio
import random
import signal
from contextlib import suppress
from itertools import count
from math import inf
from time import monotonic
from typing import Literal

from tests.faults.idempotency_doors import DOORS, Answer, Door
from tests.faults.idempotency_history import Asked, Fault, History, Run
from tests.faults.idempotency_scene import GONE, IN_PROGRESS, Worker, World, retried

CALLER = "alice"
_SHARED = "shared"  # The operation whose keys are good behind both doors.
_CLIENTS = 5  # Behind each door.
_WINDOW = 5  # Keys of each door, and of both, that are in use at a time.
_TURNOVER = 0.25  # Seconds after which the oldest of them is left alone.
_PATIENCE = 4.0  # Seconds.
_WORK = (0.0, 0.0, 0.05, 0.3, 1.2)  # Seconds that a handler takes.
_FAILING = 0.3  # Of the handlers.
_TOLD: dict[str, Literal["ran", "replayed", "waiting", "failed", "refused", "unknown", "other"]] = {
    "ran": "ran",
    "replayed": "replayed",
    IN_PROGRESS: "waiting",
    "failed": "failed",
    GONE: "refused",
    "lost": "unknown",
}


class Storm:
    """Clients that retry and hang up, and what strikes the processes that they call.

    Args:
        scene: where.
        seed: of all that is random here. What the machine adds to it is not.
    """

    def __init__(self, scene: World, seed: int) -> None:
        self._scene = scene
        self._random = random.Random(seed)  # noqa: S311 - a game, no secret
        self._asked: list[Asked] = []
        self._failing: set[str] = set()
        self.faults: list[Fault] = []
        self._ops = count()
        self._began = 0.0
        self._over = 0.0

    async def rage(self, seconds: float, *, faults: bool = True) -> History:
        """Let it rage, then have each key retried until it is answered; return the history."""
        self._began = monotonic()
        self._over = self._began + seconds
        clients = [self._client(door) for door in DOORS.values() for _ in range(_CLIENTS)]
        nemeses = [self._strike_workers(), self._strike_redis()] if faults else []
        await asyncio.gather(*clients, *nemeses)
        keys = {call.key.partition("/")[2] for call in self._asked}
        await asyncio.gather(*(self._finish(key, door) for key in keys for door in _doors_of(key)))
        return self._history()

    # -- clients

    async def _client(self, door: Door) -> None:
        while monotonic() < self._over:
            newest = int((monotonic() - self._began) / _TURNOVER)
            space = self._random.choice((door.name, _SHARED))
            key = f"{space}-{newest + self._random.randrange(_WINDOW)}"
            fails = self._random.random() < _FAILING
            worker = self._random.choice(self._scene.workers)
            call = asyncio.create_task(self._ask(door, worker, key, fails=fails))
            if self._random.random() < 0.1:
                await asyncio.wait([call], timeout=self._random.uniform(0, 0.3))
                call.cancel()
            with suppress(asyncio.CancelledError):
                await call
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def _ask(self, door: Door, worker: Worker, key: str, *, fails: bool = False) -> Answer:
        op, at, end = f"op-{next(self._ops)}", monotonic(), "raise" if fails else "ok"
        if fails:
            self._failing.add(op)
        to, seconds = _SHARED if key.startswith(_SHARED) else "reexecute", self._random.choice(_WORK)
        answer = Answer("lost")
        try:
            answer = await door.post(
                worker, key, caller=CALLER, patience=_PATIENCE, to=to, op=op, seconds=seconds, end=end
            )
        finally:
            told = _TOLD.get(answer.told, "other")
            until = inf if told == "unknown" else monotonic()
            # Each door has its own bytes for one result.
            reply = answer.run.encode() if key.startswith(_SHARED) else answer.body
            self._asked.append(Asked(f"{CALLER}/{key}", op, at, until, told, answer.run, reply))
        return answer

    async def _finish(self, key: str, door: Door) -> None:
        # At both processes, so that each key has a replay.
        for worker in self._scene.workers:
            await retried(lambda worker=worker: self._ask(door, worker, key), IN_PROGRESS, GONE, "lost")  # type: ignore[misc] # the loop's own worker

    # -- faults

    async def _strike_workers(self) -> None:
        while monotonic() < self._over:
            await asyncio.sleep(self._random.uniform(0.3, 0.8))
            victim = self._random.choice(self._scene.workers)
            at = monotonic()
            if self._random.random() < 0.5:
                self.faults.append(Fault(victim.name, at, inf))
                await victim.kill()
                await self._scene.replace(victim)
                continue
            victim.signal(signal.SIGSTOP)
            await asyncio.sleep(self._scene.lease * self._random.uniform(1.2, 1.8))
            victim.signal(signal.SIGCONT)
            self.faults.append(Fault(victim.name, at, monotonic()))

    async def _strike_redis(self) -> None:
        while monotonic() < self._over:
            await asyncio.sleep(self._random.uniform(1.0, 2.0))
            at = monotonic()
            self._scene.redis.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(self._random.uniform(0.2, 0.8))
            finally:
                self._scene.redis.signal(signal.SIGCONT)
            self.faults.append(Fault(None, at, monotonic()))

    # -- what was seen

    def _history(self) -> History:
        ledger = self._scene.ledger
        ends = {note.run: note.at for note in ledger.notes if note.event == "end"}
        runs = [
            Run(
                *(note.key, note.run, note.epoch, note.process, note.op, note.at, ends.get(note.run, inf)),
                failed=note.op in self._failing and note.run in ends,
            )
            for note in ledger.notes
            if note.event == "run"
        ]
        # Whatever kept a process from running is as good a cause as a signal.
        lags = [Fault(note.process, note.at - note.seconds, note.at) for note in ledger.lags()]
        return History(runs, self._asked, [*self.faults, *lags])


def _doors_of(key: str) -> list[Door]:
    return [door for name, door in DOORS.items() if key.startswith((name, _SHARED))]
