"""Floor 3: policies beside the handler they protect, behind either door. They are asked from inside of the handler.

So they come after authentication, dependencies and validation, on the admission that the door opened. Called
without a door, as a unit test calls a handler, a decorated function is the function itself.
"""

from collections.abc import Callable
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, NamedTuple, TypeVar

from resilience.admission import Admission, Policy, Refused, running_admission
from resilience.call import Call
from resilience.decisions.idempotency import Takeover
from resilience.decisions.quota import Quota
from resilience.errors import ConfigurationError
from resilience.policies.idempotency import IdempotencyPolicy
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.rule import Key, OnOutage, Rule, caller
from resilience.policies.waiting import OnTwin
from resilience.stores.base import Store
from resilience.verdict import PROCEED, Proceed, Verdict

F = TypeVar("F", bound=Callable[..., Any])
Make = Callable[[Store, str], Policy]
"""Makes a policy for one operation from the pipeline's store."""


class Declared(NamedTuple):
    """What the decorators of one handler declare.

    Args:
        function: the handler itself.
        limits: what each ``rate_limit`` makes of an operation's name, the innermost first.
        keyed: makes the policy of ``idempotent``, or None.
        key_required: whether a call without a key is refused.
    """

    function: Callable[..., Any]
    limits: tuple[Callable[[str], Rule], ...] = ()
    keyed: Make | None = None
    key_required: bool = False

    async def admit(self, admission: Admission, *, in_thread: bool = False) -> Verdict:
        """Ask what is declared, once for a call: the limits in one step, then the key.

        Args:
            in_thread: whether the handler has its thread by now, and would keep it while it waits for a twin.
        """
        if any(asked is self for asked in admission.asked):
            return PROCEED
        admission.asked += (self,)
        operation = admission.call.operation
        policies: list[Policy] = []
        if self.limits:
            policies.append(admission.late((self.limits, operation), lambda store: self._limit(store, operation)))
        if self.keyed is not None:
            keyed = self.keyed
            policy = admission.late((keyed, operation), lambda store: keyed(store, operation))
            policies.append(_AtOnce(policy) if in_thread and isinstance(policy, IdempotencyPolicy) else policy)
        return await admission.admit(policies)

    def _limit(self, store: Store, operation: str) -> Policy:
        return RateLimitPolicy(store, [make(operation) for make in self.limits])


def declared(handler: Any) -> Declared | None:
    """Return what is declared at a handler, or None."""
    found: Declared | None = getattr(handler, _DECLARED, None)
    return found


def is_bypassed(handler: Any) -> bool:
    """Tell whether a handler was registered *before* it was decorated, so that its decorators are never asked."""
    return declared(handler) is None and getattr(handler, _DECORATED, False)


def rate_limit(
    max_requests: int | str | Quota,
    window_seconds: float = 60.0,
    *,
    key: Key = caller,
    cost: int = 1,
    on_outage: OnOutage | None = None,
    name: str | None = None,
) -> Callable[[F], F]:
    """Limit one handler: ``@rate_limit(max_requests=5, window_seconds=60)``, below ``@router.post(...)``.

    Each operation that the handler answers (each route template, each RPC method) has a count of its own. Several on
    one handler are one step: what one of them denies takes nothing from another.

    Args:
        max_requests: calls in one window; or a whole quota, ``"5/minute"`` or ``Quota(...)``, in place of both.
        window_seconds: the window.
        key: whom it counts for. See ``Rule``.
        cost: units that one call takes.
        on_outage: what callers see while the store is gone. See ``Rule``.
        name: what replies and the store call the rule; operations that share a name share the count.

    Raises:
        ConfigurationError: a value is out of range.
    """
    quotas = Quota.parse(max_requests) if isinstance(max_requests, str) else (_quota(max_requests, window_seconds),)
    if name is not None and len(quotas) > 1:
        raise ConfigurationError(f"Several quotas can't share the name {name!r}: stack one rate_limit for each.")

    def rule_for(quota: Quota) -> Callable[[str], Rule]:
        def rule(operation: str) -> Rule:
            derived = None if name is not None else [operation]
            return Rule(quota, key=key, operations=derived, cost=cost, on_outage=on_outage, name=name)

        rule(_ANY)  # an error belongs to the line of the decorator
        return rule

    makers = tuple(rule_for(quota) for quota in quotas)

    def decorate(function: F) -> F:
        known = _known(function)
        guarded: F = _guarded(known._replace(limits=known.limits + makers))
        return guarded

    return decorate


def idempotent(
    ttl: float = 86_400.0,
    require_key: bool = False,
    *,
    operation: str | None = None,
    lease: float = 30.0,
    takeover: Takeover = "reexecute",
    in_progress: OnTwin | None = None,
    max_wait: float = 30.0,
) -> Callable[[F], F]:
    """Run one handler at most once for each idempotency key: ``@idempotent(ttl=86400, require_key=True)``.

    Args:
        ttl: seconds that a reply is kept.
        require_key: refuse calls without a key.
        operation: one name for the same operation behind both doors. See ``IdempotencyPolicy``.
        lease: seconds until the key of a dead worker can be taken over.
        takeover: what happens to the key of a dead worker. See ``IdempotencyPolicy``.
        in_progress: what a call does whose twin runs. See ``IdempotencyPolicy``. A plain function that is asked from
            its thread, as FastAPI's are, never waits: twins that wait in threads would leave none to others.
        max_wait: seconds that a call waits for its twin, at most.

    Raises:
        ConfigurationError: a value is out of range, or the handler streams its replies.
    """

    def make(store: Store, _operation: str) -> Policy:
        return IdempotencyPolicy(
            store,
            operation=operation,
            required=require_key,
            ttl=ttl,
            lease=lease,
            takeover=takeover,
            in_progress=in_progress,
            max_wait=max_wait,
        )

    def decorate(function: F) -> F:
        known = _known(function)
        if isasyncgenfunction(known.function) or isgeneratorfunction(known.function):
            raise ConfigurationError(f"{known.function.__qualname__} streams its replies, which can't be kept.")
        guarded: F = _guarded(known._replace(keyed=make, key_required=require_key))
        return guarded

    return decorate


class _AtOnce(NamedTuple):
    """A policy that answers at once."""

    policy: IdempotencyPolicy

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        return await self.policy.admit(call, admission, may_wait=False)


_DECLARED, _DECORATED = "__resilience_declared__", "__resilience_decorated__"
_ANY = "any"


def _quota(limit: int | Quota, window: float) -> Quota:
    return limit if isinstance(limit, Quota) else Quota(limit, per=window)


def _known(function: Any) -> Declared:
    """Return what is declared at this very function, not at one that somebody else's decorator wrapped."""
    known = declared(function)
    return known if known is not None and function.__wrapped__ is known.function else Declared(function)


def _guarded(known: Declared) -> Any:
    """Return the handler behind what it declares, in its own style: a generator stays one, a plain function too."""
    function: Any = known.function

    async def replies(*args: Any, **kwargs: Any) -> Any:
        await _admit(known)
        async for item in function(*args, **kwargs):
            yield item

    async def reply(*args: Any, **kwargs: Any) -> Any:
        await _admit(known)
        return await function(*args, **kwargs)

    def replies_of_thread(*args: Any, **kwargs: Any) -> Any:
        _admit_from_thread(known)
        yield from function(*args, **kwargs)

    def reply_of_thread(*args: Any, **kwargs: Any) -> Any:
        _admit_from_thread(known)
        return function(*args, **kwargs)

    style: Any = reply_of_thread
    if isasyncgenfunction(function):
        style = replies
    elif iscoroutinefunction(function):
        style = reply
    elif isgeneratorfunction(function):
        style = replies_of_thread
    guarded = wraps(function)(style)
    setattr(guarded, _DECLARED, known)
    setattr(function, _DECORATED, True)
    return guarded


async def _admit(known: Declared) -> None:
    admission = running_admission()
    if admission is not None:
        let_pass(await known.admit(admission))


def _admit_from_thread(known: Declared) -> None:
    admission = running_admission()
    if admission is None:
        return
    if admission.from_thread is None:
        raise ConfigurationError(f"{known.function.__qualname__} is a plain function. Make it `async def`.")
    let_pass(admission.from_thread(lambda: known.admit(admission, in_thread=True)))


def let_pass(verdict: Verdict) -> None:
    """Go on, or leave the handler with what a policy answered instead of it.

    Raises:
        Refused: the verdict is not to proceed.
    """
    if not isinstance(verdict, Proceed):
        raise Refused(verdict)
