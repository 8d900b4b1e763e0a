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
from resilience.stores.base import Want, total_costs

Part = tuple[str, str, int, str, str]
"""Of a want: rule, subject, cost, its quota's identity, and token."""
Key = Part | tuple[Part, ...]
"""The part of the one want, or those of several."""


class Group:
    """Equal calls of one turn: what each of them wants, and who waits for it."""

    __slots__ = ("asked_at", "futures", "key", "loop", "wants")

    def __init__(
        self,
        key: Key,
        wants: Sequence[Want],
        first: "asyncio.Future[Sequence[Usage]]",
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.key = key
        self.wants = wants
        self.futures = [first]
        self.loop = loop
        self.asked_at = 0.0

    @property
    def fickle(self) -> bool:
        """Whether a denial may end at any time, because a permit may be given back."""
        return any(want.quota.algorithm == "concurrency" for want in self.wants)

    def fail(self, error: BaseException) -> None:
        """Tell everyone that there is no answer."""
        for future in self.futures:
            if not future.done():
                future.set_exception(error)

    def answer(self, admitted: int, told: Sequence[int]) -> Sequence[Usage] | None:
        """Give each what it would have been told, had they been asked one by one; return what the denied were told.

        Args:
            admitted: how many of them, the first ones, were.
            told: units left, reset and wait of each rule, after these were charged.
        """
        denied = self._denied(told) if admitted < len(self.futures) else []
        if len(self.wants) == 1:
            self._admit_by_one_rule(admitted, told)
        else:
            self._admit_by_rules(admitted, told)
        for future in self.futures[admitted:]:
            if not future.done():
                future.set_result(denied)
        return denied or None

    def _admit_by_one_rule(self, admitted: int, told: Sequence[int]) -> None:
        (_, _, quota, cost, _), *_ = self.wants
        capacity, reset, left = quota.capacity, told[1] / 1e6, told[0] + admitted * cost
        for future in self.futures[:admitted]:
            left -= cost
            if not future.done():  # else its caller has gone; the unit it asked for is spent all the same
                future.set_result([_made(Usage, (True, capacity, left, reset, 0.0))])

    def _admit_by_rules(self, admitted: int, told: Sequence[int]) -> None:
        # Per rule: the capacity, what is left for the first of them, the cost of each, and the seconds until more.
        rules = [
            (want.quota.capacity, told[at * 3] + (admitted - 1) * cost, cost, told[at * 3 + 1] / 1e6)
            for at, (want, cost) in enumerate(zip(self.wants, total_costs(self.wants), strict=True))
        ]
        for index, future in enumerate(self.futures[:admitted]):
            if not future.done():
                future.set_result(
                    [Usage(True, most, left - index * cost, reset, 0.0) for most, left, cost, reset in rules]
                )

    def _denied(self, told: Sequence[int]) -> list[Usage]:
        usages = []
        for at, (want, cost) in enumerate(zip(self.wants, total_costs(self.wants), strict=True)):
            left, reset, wait = told[at * 3 : at * 3 + 3]
            capacity = want.quota.capacity
            if cost <= left:
                # Another rule denied; this one says what it would have said.
                usages.append(Usage(True, capacity, left - cost, reset / 1e6, 0.0))
            else:
                usages.append(Usage(False, capacity, left, reset / 1e6, inf if wait < 0 else wait / 1e6))
        return usages


_made = tuple.__new__  # half the time of calling a named tuple's class, once for each call of a hot key
_HANDFUL = 48  # Calls that need not wait for the end of the turn: the server works on them while the others ask.
_LONGEST_DENIAL = 1.0
_MOST_DENIALS = 10_000


def key_of(wants: Sequence[Want]) -> Key:
    """Return what makes two calls the same request."""
    if len(wants) == 1:
        rule, subject, quota, cost, token = wants[0]
        return rule, subject, cost, quota.identity, token
    return tuple([(rule, subject, cost, quota.identity, token) for rule, subject, quota, cost, token in wants])


def answered_now(usages: Sequence[Usage]) -> "asyncio.Future[Sequence[Usage]]":
    """Return what a store says at once in the form in which it says it later."""
    future: asyncio.Future[Sequence[Usage]] = asyncio.get_running_loop().create_future()
    future.set_result(usages)
    return future


class Merger:
    """Gathers the calls of one turn of the event loop; a call that has been coming alone goes at once.

    Args:
        clock: seconds of this process that never step back.
        most: groups in one request.
        ask: sends what was gathered, and sees to it that every group is answered or failed and ``answered`` is called.
    """

    def __init__(self, ask: Callable[[list[Group]], None], clock: Callable[[], float], most: int) -> None:
        self._ask = ask
        self._clock = clock
        self._most = most
        self._gathered: dict[Key, Group] = {}
        self._asked = 0
        self._calls = 0
        self._crowded = False

    def acquire(self, key: Key, wants: Sequence[Want]) -> "asyncio.Future[Sequence[Usage]]":
        """Return a future of this call's own usages."""
        group = self._gathered.get(key)
        if group is not None:
            future = group.loop.create_future()
            group.futures.append(future)
        else:
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            group = Group(key, wants, future, loop)
            if not self._asked and not self._crowded:
                self._send([group])
                return future
            if not self._gathered:
                loop.call_soon(self._send_gathered)
            self._gathered[key] = group
        self._calls += 1
        if self._calls == _HANDFUL and not self._asked:
            self._send_gathered()
        return future

    def _send_gathered(self) -> None:
        if not self._gathered:
            return  # they have left before the end of the turn
        gathered, self._gathered = self._gathered, {}
        self._crowded, self._calls = self._calls > 1, 0
        groups = list(gathered.values())
        for at in range(0, len(groups), self._most):
            self._send(groups[at : at + self._most])

    def _send(self, groups: list[Group]) -> None:
        self._asked += 1
        now = self._clock()
        for group in groups:
            group.asked_at = now
        self._ask(groups)

    def answered(self) -> None:
        """Hear that one request is no longer under way."""
        self._asked -= 1


class Denials:
    """Remembers, for a short while, which calls were denied.

    Args:
        clock: seconds of this process that never step back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.known: dict[Key, tuple[float, float, Sequence[Usage]]] = {}
        """By call: when the store was asked, until when it would repeat itself, and what it said."""

    def find(self, key: Key) -> Sequence[Usage] | None:
        """Return what the store would say of a call that it just denied, or None where it must be asked."""
        known = self.known.get(key)
        if known is None:
            return None
        asked_at, until, usages = known
        now = self._clock()
        if now >= until:
            del self.known[key]
            return None
        return [_later(usage, now - asked_at) for usage in usages]

    def note(self, key: Key, asked_at: float, usages: Sequence[Usage]) -> None:
        """Remember a denial that was asked for at ``asked_at``, at the latest until the store would admit."""
        wait = max(usage.retry_after for usage in usages)
        if len(self.known) >= _MOST_DENIALS:
            del self.known[next(iter(self.known))]
        self.known[key] = (asked_at, asked_at + min(wait, _LONGEST_DENIAL), usages)

    def forget(self, rule: str, subject: str) -> None:
        """Forget what was denied to a subject by a rule."""
        gone = [key for key in self.known if (rule, subject) in _counts_of(key)]
        for key in gone:
            del self.known[key]


def _counts_of(key: Key) -> list[tuple[object, ...]]:
    return [key[:2]] if isinstance(key[0], str) else [part[:2] for part in key if isinstance(part, tuple)]


def _later(usage: Usage, gone: float) -> Usage:
    return usage._replace(
        reset_after=max(0.0, usage.reset_after - gone),
        retry_after=0.0 if usage.allowed else max(1e-6, usage.retry_after - gone),
    )
