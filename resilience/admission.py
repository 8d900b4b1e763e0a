"""Floor 2: one call's ticket through the policies. Knows no store, no policy by name, and no wire."""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextvars import ContextVar, Token
from typing import Any, Protocol, Self

from resilience.call import Call
from resilience.caller import Identify, by_caller
from resilience.context import RequestContext, close_context, open_context, running_context
from resilience.decisions.quota import Quota, Usage
from resilience.verdict import PROCEED, Outcome, Proceed, Reply, Verdict

logger = logging.getLogger("resilience")

Hook = Callable[[Outcome], Awaitable[None]]


class Policy(Protocol):
    """One concern. Asked once per call; a hook on the admission tells it how the call ended, if it must know."""

    async def admit(self, call: Call, admission: "Admission") -> Verdict:
        """Answer for ``call``. A refusal is a value; an exception is an accident and ends the call as one."""
        ...


Late = Callable[[Hashable, Callable[[Any], Policy]], Policy]
"""Returns the policy of a decorator or guard: made once from the pipeline's store, and kept under its key."""


class Refused(Exception):  # noqa: N818 - a refusal is no error; it only has to leave the handler
    """Carries a verdict of a policy that was asked inside of a handler out to its door, which renders it."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(f"Answered by a policy: {type(verdict).__name__}")
        self.verdict = verdict


_NOBODY = RequestContext()  # Stands where no policy opened a context; nobody writes to it.


class Admission:
    """The state of one call between the policies, from the door's opening to its closing.

    ``async with`` opens it: the edge policies have spoken when the block is entered, and whatever was promised is
    settled when it is left. Not to be shared between calls.

    Args:
        call: the call.
        edge: policies to ask on entry.
        identify: finds an unauthenticated caller's identity.
        late: finds the policies of decorators and guards.
    """

    # Without slots: what most calls never change stands at the class, and costs them nothing.
    context: RequestContext = _NOBODY
    verdict: Verdict = PROCEED
    limits: tuple[tuple[str, Quota, Usage], ...] = ()
    """What each rate-limit rule said, of whichever policy: a reply tells them together."""
    capture = 0
    """How many bytes of the reply a policy needs to see; 0 for none."""
    asked: tuple[object, ...] = ()
    """Which core policies, and which decorators', were asked; each once, however many stand in the way."""
    claimed: tuple[str, ...] = ()
    """The record keys that are held for the call, so that no second policy asks for them."""
    operation: object | None = None
    """What a handler may know of the keyed operation that it runs. See ``running_operation``."""
    done: Reply | None = None
    """The answer of an operation that its handler declared done: what is kept although the handler fails later."""
    from_thread: Callable[[Callable[[], Coroutine[Any, Any, Verdict]]], Verdict] | None = None
    """Runs a coroutine for a handler in a worker thread; set by a door that has such handlers."""
    settled = False
    _hooks: tuple[Hook, ...] = ()
    _token: Token[RequestContext | None] | None = None
    _running: "Token[Admission | None] | None" = None
    _handed_over = False

    def __init__(self, call: Call, edge: Sequence[Policy], identify: Identify, late: Late) -> None:
        self.call = call
        self.metadata: list[tuple[str, str]] = []
        """Name and value pairs to add to whatever leaves: reply, refusal or error."""
        self.late = late
        self._edge = edge
        self._identify = identify

    def caller(self) -> str:
        """Name who the call is counted for, as known by now."""
        context = self.context if self.context is not _NOBODY else running_context()
        return by_caller(self.call, context, self._identify)

    def open(self, context: RequestContext) -> None:
        """Make ``context`` the call's own, until the block is left."""
        self.context = context
        self._token = open_context(context)

    def on_settle(self, hook: Hook) -> None:
        """Have ``hook`` told how the call ended. Last in, first out; each runs, whatever another raises."""
        self._hooks += (hook,)

    @property
    def hooked(self) -> bool:
        """Whether anybody waits to be told how the call ends."""
        return bool(self._hooks)

    async def admit(self, policies: Sequence[Policy]) -> Verdict:
        """Ask ``policies`` in order until one does not proceed; keep and return the verdict."""
        for policy in policies:
            verdict = await policy.admit(self.call, self)
            if verdict is not PROCEED:
                self.verdict = verdict
                return verdict
        return PROCEED

    async def settle(self, outcome: Outcome) -> None:
        """Tell every hook how the call ended. The first outcome holds; later ones change nothing."""
        if self.settled:
            return
        self.settled = True
        if self.done is not None and (outcome.ended != "completed" or outcome.reply is None):
            outcome = Outcome("completed", self.done)
        interrupted: BaseException | None = None
        while self._hooks:
            hook, self._hooks = self._hooks[-1], self._hooks[:-1]
            try:
                await hook(outcome)
            except Exception:
                # The reply is decided by now, and no accident in here may turn it into an error.
                logger.exception("A settle hook failed", extra=self.context.log_fields())
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def hand_over(self) -> None:
        """Leave settling to a task that outlives this block."""
        self._handed_over = True

    def enter(self) -> None:
        """Make this the running admission; the edge is yet to be asked. For a door that does not use ``async with``."""
        self._running = _running.set(self)

    async def leave(self, kind: type[BaseException] | None = None) -> None:
        """Settle what was promised, and close; ``kind`` is the class of the exception that ends the call, if any."""
        if self._hooks and not self._handed_over:
            if kind is None:
                ended = _ENDED if isinstance(self.verdict, Proceed) else _REFUSED
            else:
                ended = _FAILED if issubclass(kind, Exception) else _CANCELLED
            try:
                await self.settle(ended)
            finally:
                self.close()
        else:
            self.close()

    async def __aenter__(self) -> Self:
        self.enter()
        if self._edge:
            try:
                await self.admit(self._edge)
            except BaseException as error:
                await self.leave(type(error))
                raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.leave(kind)

    def close(self) -> None:
        """Close at once: for a call of which nobody is to be told how it ended."""
        if not self._handed_over:
            self.settled = True
        if self._token is not None:
            close_context(self._token)
            self._token = None
        if self._running is not None:
            try:
                _running.reset(self._running)
            except ValueError:
                pass  # left in another Context, where there is nothing to restore
            self._running = None


_running: ContextVar[Admission | None] = ContextVar("resilience_admission", default=None)


def running_admission() -> Admission | None:
    """Return the admission of the running call, or None outside of any guarded call."""
    return _running.get()


_ENDED = Outcome("completed")
_REFUSED = Outcome("refused")
_FAILED = Outcome("failed")
_CANCELLED = Outcome("cancelled")
