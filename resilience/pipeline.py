"""Floor 3: which policies a call meets, and in which order. The one object that both doors hold."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from resilience.admission import Admission, Policy
from resilience.call import Call
from resilience.caller import Identify, api_key
from resilience.policies.request_context import RequestContextPolicy
from resilience.policies.selective import declared_operations

T = TypeVar("T")


class Pipeline:
    """The policies of a service, behind every door it has.

    Args:
        core: asked where the caller is known: after the application's own authentication, right before the handler.
        edge: asked first, outside of everything. The default opens the request context.
        identify: finds an unauthenticated caller's identity; the default is a digest of ``x-api-key``.
    """

    def __init__(
        self,
        core: Sequence[Policy] = (),
        *,
        edge: Sequence[Policy] | None = None,
        identify: Identify | None = None,
    ) -> None:
        self.edge: tuple[Policy, ...] = (RequestContextPolicy(),) if edge is None else tuple(edge)
        self.core = tuple(core)
        self._identify = identify or api_key()
        self._running: set[asyncio.Task[Any]] = set()

    def admit(self, call: Call) -> Admission:
        """Return the admission of ``call``, to be opened with ``async with``; the core is asked by the door later."""
        return Admission(call, self.edge, self._identify)

    def operations(self) -> frozenset[str]:
        """Return every operation that a policy names; a door checks that the ones of its protocol exist."""
        return frozenset().union(*(declared_operations(policy) for policy in (*self.edge, *self.core)))

    def outlive(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``work`` in a task of its own, which ``drained`` waits for: its client may leave, it must not be cut."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def drained(self, timeout: float) -> bool:  # noqa: ASYNC109 - a bound for the wait, not a cancellation
        """Wait until the work that outlived its clients has ended, at most ``timeout`` seconds; tell whether it has.

        Call it after the servers have stopped and before the store is closed.
        """
        if not self._running:
            return True
        _, running = await asyncio.wait(self._running, timeout=timeout)
        return not running
