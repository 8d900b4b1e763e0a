"""A simulated fleet on one simulated Redis: real merging, real deny cache, real counting, a clock that is told to go.

What is real: ``Merger``, ``Denials`` and ``Group`` of ``resilience.stores.hot_keys`` and the sliding window of
``resilience.decisions``. What is a model: requests come by chance; a process does one thing at a time, so that what
comes meanwhile waits for its next turn, as in an event loop; a node works its commands off in their order, each in the
time that ``Costs`` gives; the network takes always the same. ``_Process`` does what ``RedisStore`` does around these.
"""

import asyncio
import random
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from heapq import heappop, heappush
from itertools import accumulate, count
from typing import Any
from zlib import crc32

from benchmarks.fleet_scene import Costs, Scene, Told
from resilience.decisions import sliding_window
from resilience.stores.base import Want
from resilience.stores.hot_keys import Denials, Group, Key, Merger, key_of
from resilience.testing import ManualClock

_MOST_GROUPS = 16  # Of one request, as in RedisStore; 1 on a cluster.


class _TurnLoop:
    """What is asked of an event loop here: to make futures, and to call in the next turn."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[..., object], *arguments: Any, context: Context | None = None) -> None:  # noqa: ARG002 - asyncio's
        self.ready.append(lambda: callback(*arguments))

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def get_debug(self) -> bool:
        return False


class _Node:
    """One Redis: counts as the script does, and is busy meanwhile."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._counts: dict[str, array[int]] = {}
        self.free_at = 0.0
        self.worked = 0.0

    def serve(self, groups: Sequence[Group], now: float) -> tuple[float, list[tuple[int, list[int]]]]:
        """Return when the reply leaves, and what it says of each group."""
        calls = sum(len(group.futures) for group in groups)
        costs = self._costs
        takes = costs.command + costs.group * len(groups) + costs.call * (calls - len(groups))
        self.worked += takes
        self.free_at = max(self.free_at, now) + takes
        return self.free_at, [self._take(group, self.free_at) for group in groups]

    def _take(self, group: Group, now: float) -> tuple[int, list[int]]:
        (want,), many = group.wants, len(group.futures)
        marks = self._counts.setdefault(want.subject, sliding_window.empty())
        admitted = min(many, sliding_window.decide(marks, want.quota, 0, now).remaining)
        if admitted:
            sliding_window.charge(marks, want.quota, admitted, now)
        usage = sliding_window.decide(marks, want.quota, 1 if admitted < many else 0, now)
        return admitted, [usage.remaining, round(usage.reset_after * 1e6), round(usage.retry_after * 1e6)]


class _Process:
    """One process of the fleet: turns of a loop, and what ``RedisStore`` does in them."""

    def __init__(self, fleet: "_Fleet") -> None:
        self.loop = _TurnLoop()
        self.inbox: deque[Callable[[], None]] = deque()
        self.turning = False
        self._fleet = fleet
        clock, most = fleet.clock, _MOST_GROUPS if fleet.scene.nodes == 1 else 1
        self._merger = Merger(self._ask, clock, most)
        self._denials = Denials(clock)

    def wake(self, at: float) -> None:
        """Have a turn as soon as there is time for one."""
        if not self.turning:
            self.turning = True
            self._fleet.at(at, self._turn)

    def _turn(self) -> None:
        clock = self._fleet.clock
        handles = [*self.loop.ready, *self.inbox]
        self.loop.ready.clear()
        self.inbox.clear()
        asyncio._set_running_loop(self.loop)  # type: ignore[arg-type]  # noqa: SLF001 - for those who write loops
        for handle in handles:
            handle()
        self._fleet.at(clock.now, self._end)

    def _end(self) -> None:
        self.turning = False
        if self.loop.ready or self.inbox:  # came while the turn ran
            self.wake(self._fleet.clock.now)

    def request(self, want: Want) -> None:
        """Serve one request."""
        fleet, key = self._fleet, key_of([want])
        fleet.clock.advance(fleet.costs.request)
        if fleet.scene.deny and self._denials.find(key) is not None:
            fleet.ended(1, denied=1)
            fleet.clock.advance(fleet.costs.request)
        elif fleet.scene.merge:
            self._merger.acquire(key, [want])
        else:
            self._alone(key, want)

    def _alone(self, key: Key, want: Want) -> None:
        loop: Any = self.loop
        group = Group(key, [want], loop.create_future(), loop)
        group.asked_at = self._fleet.clock.now
        self._ask([group])

    def _ask(self, groups: list[Group]) -> None:
        self._fleet.send(self, groups)

    def answered(self, groups: Sequence[Group], answers: Sequence[tuple[int, list[int]]]) -> None:
        """Hear a reply."""
        fleet = self._fleet
        if fleet.scene.merge:
            self._merger.answered()
        for group, (admitted, told) in zip(groups, answers, strict=True):
            denied = group.answer(admitted, told)
            if denied is not None and fleet.scene.deny:
                self._denials.note(group.key, group.asked_at, denied)
            many = len(group.futures)
            fleet.ended(many, denied=many - admitted)
            fleet.waited(many, fleet.clock.now - group.asked_at)
            fleet.clock.advance(fleet.costs.request * many)


class _Fleet:
    """All processes, all nodes, and what happens when."""

    def __init__(self, scene: Scene, costs: Costs, seed: int) -> None:
        self.scene, self.costs = scene, costs
        self.clock = ManualClock(0.0)
        self._chance = random.Random(seed)  # noqa: S311 - the same fleet each time
        self._nodes = [_Node(costs) for _ in range(scene.nodes)]
        self._processes = [_Process(self) for _ in range(scene.processes)]
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._came = self._denied = self._commands = 0
        self._waits: list[tuple[float, int]] = []

    def at(self, when: float, act: Callable[[], None]) -> None:
        """Have something done at an instant."""
        heappush(self._heap, (when, next(self._numbers), act))

    def _counting(self) -> bool:
        return self.clock.now >= self.scene.warm

    def ended(self, many: int, *, denied: int) -> None:
        """Hear that calls were answered."""
        if self._counting():
            self._came += many
            self._denied += denied

    def waited(self, many: int, seconds: float) -> None:
        """Hear how long the store took."""
        if self._counting():
            self._waits.append((seconds, many))

    def send(self, process: _Process, groups: list[Group]) -> None:
        """Carry a command to its node."""
        self._commands += self._counting()
        node = self._nodes[crc32(groups[0].wants[0].subject.encode()) % len(self._nodes)]

        def arrive() -> None:
            leaves_at, answers = node.serve(groups, self.clock.now)
            self.at(leaves_at + self.costs.network, lambda: arrived(answers))

        def arrived(answers: list[tuple[int, list[int]]]) -> None:
            process.inbox.append(lambda: process.answered(groups, answers))
            process.wake(self.clock.now)

        self.at(self.clock.now + self.costs.network, arrive)

    def run(self) -> Told:
        """Let it happen."""
        scene, chance = self.scene, self._chance
        weights = list(accumulate(rank**-scene.skew for rank in range(1, scene.callers + 1)))
        callers, block = range(scene.callers), 4096
        wants: dict[int, Want] = {}
        came_at, warm_work = 0.0, [0.0] * len(self._nodes)
        warmed = False
        while came_at < scene.seconds:
            for caller in chance.choices(callers, cum_weights=weights, k=block):
                came_at += chance.expovariate(scene.rate)
                self._until(came_at)
                if not warmed and came_at >= scene.warm:
                    warmed, warm_work = True, [node.worked for node in self._nodes]
                want = wants.get(caller)
                if want is None:
                    want = wants[caller] = Want("r", f"caller-{caller}", scene.quota, 1)
                self._come(self._processes[int(chance.random() * scene.processes)], want)
        return self._told(came_at - scene.warm, warm_work)

    def _come(self, process: _Process, want: Want) -> None:
        process.inbox.append(lambda: process.request(want))
        process.wake(self.clock.now)

    def _until(self, when: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= when:
            self.clock.now, _, act = heappop(heap)
            act()
        self.clock.now = when

    def _told(self, seconds: float, before: Sequence[float]) -> Told:
        worked = [node.worked - early for node, early in zip(self._nodes, before, strict=True)]
        return Told(
            self._came / seconds,
            self._denied / seconds,
            self._commands / seconds,
            max(worked) / seconds,
            _percentile(self._waits, 0.99),
        )


def _percentile(waits: list[tuple[float, int]], share: float) -> float:
    passed = share * sum(many for _, many in waits)
    for seconds, many in sorted(waits):
        passed -= many
        if passed <= 0:
            return seconds
    return 0.0


def simulate(scene: Scene, costs: Costs, seed: int = 1) -> Told:
    """Let a fleet run; not to be called from a thread whose event loop runs."""
    try:
        return _Fleet(scene, costs, seed).run()
    finally:
        asyncio._set_running_loop(None)  # noqa: SLF001 - as above
