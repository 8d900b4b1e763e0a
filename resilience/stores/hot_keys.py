"""Floor 1: what makes a busy store cheap: calls of one turn share a request, and who is over the limit isn't asked for.

Ground rules
- A merged request is at-most-n: of n equal calls the store admits the first k, as it would have one by one.
- A denial is remembered no longer than the store would have repeated it, and at most a second, so that a
  reset by an operator is seen soon.
"""

import asyncio
from collections.abc import Callable, Sequence
from math import inf

from resilience.decisions.quota import Usage
from resilience.stores.base import Want

Key = tuple[tuple[str, str, int], ...]


class Group:
    """Equal calls of one turn: what each of them wants, and who waits for it."""

    __slots__ = ("futures", "wants")

    def __init__(self, wants: Sequence[Want], first: "asyncio.Future[Sequence[Usage]]") -> None:
        self.wants = wants
        self.futures = [first]

    def fail(self, error: BaseException) -> None:
        """Tell everyone that there is no answer."""
        for future in self.futures:
            if not future.done():
                future.set_exception(error)

    def answer(self, admitted: int, told: Sequence[int]) -> None:
        """Give each what it would have been told, had they been asked one by one.

        Args:
            admitted: how many of them, the first ones, were.
            told: units left, reset and wait of each rule, after these were charged.
        """
        for index, future in enumerate(self.futures):
            if not future.done():  # else its caller has gone; the unit it asked for is spent all the same
                future.set_result(self._usages(index, admitted, told))

    def _usages(self, index: int, admitted: int, told: Sequence[int]) -> Sequence[Usage]:
        usages = []
        for at, want in enumerate(self.wants):
            left, reset, wait = told[at * 3 : at * 3 + 3]
            capacity, cost = want.quota.capacity, want.cost
            if index < admitted:
                usages.append(Usage(True, capacity, left + (admitted - 1 - index) * cost, reset / 1e6, 0.0))
            elif cost <= left:
                # Another rule denied; this one says what it would have said.
                usages.append(Usage(True, capacity, left - cost, reset / 1e6, 0.0))
            else:
                usages.append(Usage(False, capacity, left, reset / 1e6, inf if wait < 0 else wait / 1e6))
        return usages


_LONGEST_DENIAL = 1.0
_MOST_DENIALS = 10_000


def key_of(wants: Sequence[Want]) -> Key:
    """Return what makes two calls the same request."""
    return tuple([(want.rule, want.subject, want.cost) for want in wants])


class Merger:
    """Gathers the calls of one turn of the event loop.

    Args:
        ask: sends what was gathered, and sees to it that every group is answered or failed.
    """

    def __init__(self, ask: Callable[[list[Group]], None]) -> None:
        self._ask = ask
        self._gathered: dict[Key, Group] = {}

    def acquire(self, key: Key, wants: Sequence[Want]) -> "asyncio.Future[Sequence[Usage]]":
        """Return a future of this call's own usages."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Usage]] = loop.create_future()
        group = self._gathered.get(key)
        if group is not None:
            group.futures.append(future)
            return future
        if not self._gathered:
            loop.call_soon(self._send)
        self._gathered[key] = Group(wants, future)
        return future

    def _send(self) -> None:
        gathered, self._gathered = self._gathered, {}
        self._ask(list(gathered.values()))


class Denials:
    """Remembers, for a short while, which calls were denied.

    Args:
        clock: seconds of this process that never step back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[Key, tuple[float, float, Sequence[Usage]]] = {}

    def find(self, key: Key) -> Sequence[Usage] | None:
        """Return what the store would say of a call that it just denied, or None where it must be asked."""
        known = self._known.get(key)
        if known is None:
            return None
        asked_at, until, usages = known
        now = self._clock()
        if now >= until:
            del self._known[key]
            return None
        gone = now - asked_at
        return [
            usage._replace(
                reset_after=max(0.0, usage.reset_after - gone), retry_after=max(0.0, usage.retry_after - gone)
            )
            for usage in usages
        ]

    def note(self, key: Key, asked_at: float, usages: Sequence[Usage]) -> None:
        """Remember a denial that was asked for at ``asked_at``, at the latest until the store would admit."""
        wait = max(usage.retry_after for usage in usages)
        if len(self._known) >= _MOST_DENIALS:
            del self._known[next(iter(self._known))]
        self._known[key] = (asked_at, asked_at + min(wait, _LONGEST_DENIAL), usages)

    def forget(self, rule: str, subject: str) -> None:
        """Forget what was denied to a subject by a rule."""
        gone = [key for key in self._known if any(part[:2] == (rule, subject) for part in key)]
        for key in gone:
            del self._known[key]


def _later(usage: Usage, gone: float) -> Usage:
    return usage._replace(
        reset_after=max(0.0, usage.reset_after - gone),
        retry_after=max(0.0, usage.retry_after - gone),
    )
