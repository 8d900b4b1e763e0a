"""Floor 2: waits for operations that somebody else runs: one poller for each, however many wait, none when nobody does.

Facts
- A poller asks 50 ms after the first twin came, then ever more rarely down to every 500 ms, each time a little
  off; where the operation ends in this process, it is told so and asks at once.
- It may be granted the key itself, since the first failed or died: one of those who wait then runs, and the others
  go on waiting for that one.
- It is nobody's task: who came first may leave, and its log lines carry no call's ids.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from random import uniform
from secrets import token_hex
from typing import Literal

from resilience.decisions.idempotency import Claim, Claimed, InProgress
from resilience.errors import StoreUnavailableError

OnTwin = Literal["reject", "wait"]
"""What a call does whose twin runs."""

Ask = Callable[[str, str, bytes], Awaitable[Claim]]
"""Asks the store to run the operation under a key: with a token, and the payload's fingerprint."""

Release = Callable[[str, str], Awaitable[bool]]
"""Frees a key that a token holds."""

Ended = tuple[str, Claim]
"""How a wait ended: what the store said, and the token that it said it to."""


class WaitingRoom:
    """Where the calls of one policy wait for their twins.

    Policies don't share their rooms: of two for one operation over one store, each asks the store by itself, and hears
    of what the other has run when it next asks.

    Args:
        ask: asks the store for a key.
        release: gives a key back that was granted when nobody waited any more.
        shortest, longest: seconds between two questions, at first and at last.
        most: how many calls may wait at once, at least 0; to one more the room is full.
        jitter: returns the seconds to wait, between two bounds.
    """

    def __init__(
        self,
        ask: Ask,
        release: Release,
        *,
        shortest: float = 0.05,
        longest: float = 0.5,
        most: int = 10_000,
        jitter: Callable[[float, float], float] = uniform,
    ) -> None:
        self.ask = ask
        self.release = release
        self.shortest = shortest
        self.longest = longest
        self.jitter = jitter
        self._most = most
        self._waiting = 0
        self._watches: dict[str, dict[bytes, _Watch]] = {}

    def is_watched(self, key: str, fingerprint: bytes) -> bool:
        """Tell whether somebody waits for this very request by now, and there is room for one more."""
        return bool(self._watches) and self._waiting < self._most and self._find(key, fingerprint) is not None

    async def wait(self, key: str, fingerprint: bytes, seen: InProgress, timeout: float) -> Ended:  # noqa: ASYNC109 - a bound for the wait, not a cancellation
        """Wait until the operation has ended, or is this call's to run.

        Args:
            seen: what the store said last.
            timeout: seconds, at most.

        Returns:
            The end of it; ``InProgress`` where ``timeout`` came first, or the room is full.

        Raises:
            StoreUnavailableError: the store was gone when it was asked.
        """
        if self._waiting >= self._most:
            return "", seen
        watch = self._find(key, fingerprint)
        if watch is None:
            watch = _Watch(self, key, fingerprint, seen)
            self._watches.setdefault(key, {})[fingerprint] = watch
        self._waiting += 1
        try:
            return await watch.join(timeout)
        finally:
            self._waiting -= 1

    def wake(self, key: str) -> None:
        """Have those who wait for ``key`` ask at once: it was freed or completed just now, in this process."""
        if self._watches:
            loop = asyncio.get_running_loop()
            for watch in self._watches.get(key, {}).values():
                if watch.loop is loop:
                    watch.woken.set()

    def close(self, watch: "_Watch") -> None:
        """Forget a watch that has ended."""
        watches = self._watches.get(watch.key, {})
        if watches.get(watch.fingerprint) is watch:
            del watches[watch.fingerprint]
            if not watches:
                del self._watches[watch.key]

    def _find(self, key: str, fingerprint: bytes) -> "_Watch | None":
        watch = self._watches.get(key, {}).get(fingerprint)
        # One of another event loop, which may be closed, is no use to this one.
        return watch if watch is not None and watch.loop is asyncio.get_running_loop() else None


class _Watch:
    """Those who wait for one operation with one payload, and the task that asks for them."""

    __slots__ = ("_room", "_seen", "_task", "_waiting", "fingerprint", "key", "loop", "woken")

    def __init__(self, room: WaitingRoom, key: str, fingerprint: bytes, seen: InProgress) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.loop = asyncio.get_running_loop()
        self.woken = asyncio.Event()
        self._room = room
        self._seen = seen
        # In the order in which they came.
        self._waiting: dict[asyncio.Future[Ended | Exception], None] = {}
        self._task = self.loop.create_task(self._poll(), context=Context())
        self._task.add_done_callback(self._end)  # one that is cancelled before its first step takes none

    async def join(self, timeout: float) -> Ended:  # noqa: ASYNC109 - as in the room
        """Wait. See ``WaitingRoom.wait``."""
        told: asyncio.Future[Ended | Exception] = self.loop.create_future()
        self._waiting[told] = None
        try:
            await asyncio.wait((told,), timeout=timeout)
        except asyncio.CancelledError:
            if told.done():
                del self._waiting[told]
                await self._hand_on(told.result())
            raise
        finally:
            self._waiting.pop(told, None)
            if not self._waiting:
                self.woken.set()  # so that the task ends
        end = told.result() if told.done() else ("", self._seen)
        if isinstance(end, Exception):
            raise end
        return end

    async def _poll(self) -> None:
        room, token, pause = self._room, token_hex(16), self._room.shortest
        try:
            while self._waiting:
                await self._pause(pause)
                if not self._waiting:
                    break
                claim = await room.ask(self.key, token, self.fingerprint)
                if isinstance(claim, InProgress):
                    self._seen = claim
                    pause = min(2 * pause, room.longest)
                elif isinstance(claim, Claimed):
                    await self._hand_on((token, claim))
                    token, pause = token_hex(16), room.shortest
                else:
                    self._tell((token, claim))
                    return
        except Exception as error:  # whatever it is, nobody is left waiting
            self._tell(error)
            room.close(self)
            if isinstance(error, StoreUnavailableError):
                await self._release(token)  # it may have granted the key before it fell silent
        finally:
            self._end()

    async def _pause(self, seconds: float) -> None:
        timer = self.loop.call_later(self._room.jitter(seconds / 2, seconds), self.woken.set)
        try:
            await self.woken.wait()
        finally:
            timer.cancel()
        self.woken.clear()

    def _end(self, _task: object = None) -> None:
        self._room.close(self)
        self._tell(StoreUnavailableError("The wait for a running operation was cut off."))

    def _tell(self, end: Ended | Exception) -> None:
        for told in self._waiting:
            if not told.done():
                told.set_result(end)

    async def _hand_on(self, end: Ended | Exception) -> None:
        """Give a granted key to one of those who wait, or back to the store where nobody does."""
        if isinstance(end, Exception) or not isinstance(end[1], Claimed):
            return
        for told in self._waiting:
            if not told.done():
                told.set_result(end)
                return
        await self._release(end[0])

    async def _release(self, token: str) -> None:
        try:
            await self._room.release(self.key, token)
        except StoreUnavailableError:
            pass  # the lease runs out
