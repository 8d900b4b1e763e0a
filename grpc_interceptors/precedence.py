"""Floor 4: what the calls of one method are held to.

Precedence: the decorator at the handler, then the method's option, then the pipeline's default; for limits and for keys
each on its own. Decorators and options are asked right after the pipeline's policies.

- Limits add up: a call is held to the pipeline's, and to those of its decorators, else of its option.
- A key is claimed once, by the most specific policy: its ttl, its lease and its way to wait hold. The pipeline's
  ``IdempotencyPolicy`` is then asked for nothing but whether a key is required: nobody loosens that. The records stay
  in that policy's store.

Where an interceptor of somebody else's, further in, hides a decorator from the door, decorator and option both hold,
and a key of the pipeline's is the pipeline's.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from grpc_interceptors.options import Beside, Unhonoured
from resilience import wire
from resilience.admission import Admission, Policy
from resilience.call import Call
from resilience.decorators import Declared, Make
from resilience.pipeline import Pipeline
from resilience.policies.idempotency import IdempotencyPolicy
from resilience.policies.selective import Selective
from resilience.verdict import PROCEED, Verdict


class _InTurn(NamedTuple):
    """A decorator for one concern and an option for the other."""

    first: Declared
    second: Declared

    async def admit(self, admission: Admission) -> Verdict:
        verdict = await self.first.admit(admission)
        return verdict if verdict is not PROCEED else await self.second.admit(admission)


class _OfKeyless(NamedTuple):
    """A policy that is asked for calls without a key only, which it may refuse."""

    policy: Policy

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        if call.metadata.get(wire.IDEMPOTENCY_KEY) is None:
            return await self.policy.admit(call, admission)
        return PROCEED


Specific: TypeAlias = Beside | _InTurn
"""What decorators and options ask of the calls of one method."""


class Asked(NamedTuple):
    """What is asked for the calls of one method at the core.

    Args:
        core: the pipeline's policies.
        specific: asked after them, if there is anything.
    """

    core: tuple[Policy, ...]
    specific: Specific | None


def in_precedence(pipeline: Pipeline, operation: str, decorators: Declared | None, options: Beside | None) -> Asked:
    """Return what is asked where a handler has ``decorators`` and its method, called ``operation``, has ``options``."""
    specific = _specific(decorators, options)
    keyed = _keyed(specific)
    core = tuple(_selected(pipeline.core, operation))
    if keyed is not None:
        core = tuple(kept for policy in core if (kept := _below(policy, keyed, pipeline, operation)) is not None)
    return Asked(core, specific)


def _selected(policies: Iterable[Policy], operation: str) -> Iterator[Policy]:
    """Yield the policies that concern an operation, so that not every call has to find them out again."""
    for policy in policies:
        if type(policy) is not Selective:
            yield policy
        elif operation in policy.operations:
            yield from _selected([policy.policy], operation)


def _specific(decorators: Declared | None, options: Beside | None) -> Specific | None:
    if decorators is None or options is None or isinstance(options, Unhonoured):
        return options or decorators
    if not decorators.limits and options.limits:
        return _InTurn(options._replace(keyed=None, key_required=False), decorators)
    if decorators.keyed is None and options.keyed is not None:
        return _InTurn(decorators, options._replace(limits=()))
    return decorators


def _keyed(specific: Specific | None) -> Make | None:
    if isinstance(specific, _InTurn):
        return specific.first.keyed or specific.second.keyed
    return specific.keyed if isinstance(specific, Declared) else None


def _below(policy: Policy, keyed: Make, pipeline: Pipeline, operation: str) -> Policy | None:
    """Return what is left of a policy of the pipeline where something more specific holds the key."""
    inner = getattr(policy, "policy", policy)  # one that somebody else's policy stands before, too
    if not isinstance(inner, IdempotencyPolicy):
        return policy
    store: Any = inner.store
    pipeline.late((keyed, operation), lambda _store: keyed(store, operation))
    return _OfKeyless(policy) if inner.required else None
