"""Floor 4: what a gateway tells of a request, and what that request asks of a policy's rules. Keeps none of it."""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

from grpc_interceptors.call import InvocationMetadata
from grpc_interceptors.rls_pb2 import (
    UNIT_DAY,
    UNIT_HOUR,
    UNIT_MINUTE,
    UNIT_MONTH,
    UNIT_SECOND,
    UNIT_UNKNOWN,
    UNIT_WEEK,
    UNIT_YEAR,
    Descriptor,
    Unit,
)
from resilience.admission import Admission, Policy
from resilience.call import UNMATCHED, Call
from resilience.caller import Identify, api_key, by_address
from resilience.context import RequestContext, get_request_id
from resilience.decisions.quota import Quota, Usage
from resilience.errors import ConfigurationError
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.rule import Rule
from resilience.policies.wants import wants_of
from resilience.stores.base import Want

_UNITS = {
    1.0: UNIT_SECOND,
    60.0: UNIT_MINUTE,
    3600.0: UNIT_HOUR,
    86400.0: UNIT_DAY,
    7 * 86400.0: UNIT_WEEK,
    365 * 86400.0: UNIT_YEAR,
}
_NOBODY = by_address(Call("grpc", UNMATCHED, InvocationMetadata(())))
_MOST_UNITS = 2**31  # More than any quota has.


class GatewayRules:
    """The rules of one policy, as a gateway draws on them: same names, same subjects, same store.

    Rules in shadow are left to the services, and so are those of ``concurrency``: a gateway never tells that a request
    has ended.

    Args:
        policy: the one that the services enforce.
        identify: finds an unauthenticated caller's identity; the pipeline's. The default is a digest of ``x-api-key``.
    """

    def __init__(self, policy: RateLimitPolicy, identify: Identify | None = None) -> None:
        self._policy = policy
        self._rules = tuple(
            rule for rule in policy.rules if not rule.shadow and (rule.tiered or rule.quota.algorithm != "concurrency")
        )
        self._identify = identify or api_key()

    async def wants(self, descriptor: Descriptor, hits: int) -> list[Want]:
        """Return what the request that ``descriptor`` tells of asks for; nothing where no rule concerns it.

        Entries called ``user``, ``tenant``, ``remote_address`` and ``operation`` say what their names say, ``rule``
        names the one rule to draw on, and any other entry is a header of the request. Without ``rule``, every rule is
        asked, as at a door, of a request whose sender is told. Empty values count as absent.

        Args:
            hits: how many requests it counts as, at least 0.
        """
        entries = [(entry.key, entry.value) for entry in descriptor.entries if entry.value]
        told = dict(entries)
        operation = told.get("operation", UNMATCHED)
        call = Call(
            "grpc" if operation.startswith("/") else "http",
            operation,
            InvocationMetadata([(key.lower(), value) for key, value in entries]),
            peer=told.get("remote_address"),
        )
        named = {value for key, value in entries if key == "rule"}
        if named:
            rules: Sequence[Rule] = [rule for rule in self._rules if rule.name in named]
        elif told.keys() & {"user", "tenant", "remote_address"} or self._identify(call) is not None:
            rules = self._rules
        else:
            return []
        async with Admission(call, (), self._identify, self._late) as admission:
            context = RequestContext(get_request_id(), protocol=call.protocol)
            admission.open(context)
            context.set_user(None)  # Whoever the gateway has signed in as: it is not who is counted.
            wants = await wants_of([rule for rule in rules if rule.stage == "edge"], call, admission, "")
            context.set_user(told.get("user"), told.get("tenant"))
            wants += await wants_of([rule for rule in rules if rule.stage == "core"], call, admission, "")
        # A door knows where each request comes from. Here that may be left out, and must not make one caller of all.
        return [want._replace(cost=min(want.cost * hits, _MOST_UNITS)) for want in wants if want.subject != _NOBODY]

    async def take(self, wants: Sequence[Want]) -> list[Usage | None]:
        """Take all that is wanted or nothing, in one step; None for what nobody counts while the store is gone.

        What costs 0 only looks, and is denied where nothing is left. Looks that stand beside charges are a step before.

        Raises:
            StoreUnavailableError: a rule that is closed meanwhile can't be asked.
        """
        looks = [not want.cost for want in wants]
        if any(looks):
            seen = await self._policy.take([want._replace(cost=0) for want in wants])
            seen = [_looked(usage) if look else usage for look, usage in zip(looks, seen, strict=True)]
            if all(looks) or any(usage is not None and not usage.allowed for usage in seen):
                return seen
        return await self._policy.take(wants)

    def _late(self, _key: Hashable, make: Callable[[Any], Policy]) -> Policy:
        return make(self._policy.store)  # for a rule's function that asks one; no handler runs here


def unit_of(quota: Quota) -> Unit:
    """Return the gateway's name of a window, or UNKNOWN for one that has none, like ten seconds."""
    return UNIT_MONTH if quota.calendar == "month" else _UNITS.get(quota.per, UNIT_UNKNOWN)


def overridden(wants: Sequence[Want], limit: int, unit: Unit) -> list[Want] | None:
    """Put the gateway's own limit in the place of each one of the same unit; None where there is none, or it is 0.

    Another window would start another count, hence not share the services' one.
    """
    if unit == UNIT_UNKNOWN or all(unit_of(want.quota) != unit for want in wants):
        return None
    try:
        return [
            want._replace(quota=_with_limit(want.quota, limit)) if unit_of(want.quota) == unit else want
            for want in wants
        ]
    except ConfigurationError:
        return None


@lru_cache(1024)
def _with_limit(quota: Quota, limit: int) -> Quota:
    if quota.calendar is not None:
        return Quota(limit, calendar=quota.calendar)
    burst = None if quota.burst is None else min(quota.burst, limit)
    return Quota(limit, quota.per, algorithm=quota.algorithm, burst=burst)


def _looked(usage: Usage | None) -> Usage | None:
    if usage is None or usage.remaining:
        return usage
    return usage._replace(allowed=False, retry_after=usage.reset_after)
