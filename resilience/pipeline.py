"""Floor 3: which policies a call meets, and in which order. The one object that both doors hold."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, TypeVar

from resilience.admission import Admission, Policy
from resilience.call import Call
from resilience.caller import Identify, api_key
from resilience.policies.request_context import RequestContextPolicy
from resilience.policies.selective import declared_operations, store_of
from resilience.policies.stages import split_stages
from resilience.stores.base import Store
from resilience.stores.memory import MemoryStore

T = TypeVar("T")


class Pipeline:
    """The policies of a service, behind every door it has.

    Args:
        core: asked where the caller is known: after the application's own authentication, right before the handler.
            Rules of a rate limit that say ``stage="edge"`` are asked at the edge.
        edge: asked first, outside of everything. The default opens the request context.
        identify: finds an unauthenticated caller's identity; the default is a digest of ``x-api-key``.
        store: where decorators and guards count and keep records. The default is the store of the first policy that
            has one, else this process's memory.
    """

    def __init__(
        self,
        core: Sequence[Policy] = (),
        *,
        edge: Sequence[Policy] | None = None,
        identify: Identify | None = None,
        store: Store | None = None,
    ) -> None:
        early, self.core = split_stages(core)
        self.edge: tuple[Policy, ...] = ((RequestContextPolicy(),) if edge is None else tuple(edge)) + early
        self._identify = identify or api_key()
        self.store: Store = store or next(filter(None, map(store_of, core)), None) or MemoryStore()
        self._late: dict[Hashable, Policy] = {}
        self._find_late = self.late  # bound once, not once for each call
        self._running: set[asyncio.Task[Any]] = set()

    def admit(self, call: Call) -> Admission:
        """Return the admission of ``call``, to be opened with ``async with``; the core is asked by the door later."""
        return Admission(call, self.edge, self._identify, self._find_late)

    def late(self, key: Hashable, make: Callable[[Store], Policy]) -> Policy:
        """Return the policy that a decorator or guard keeps under ``key``, made when first asked for."""
        policy = self._late.get(key)
        if policy is None:
            policy = self._late[key] = make(self.store)
        return policy

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
