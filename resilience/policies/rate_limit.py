"""Floor 2: so much and no more, told to the caller in every reply."""

from collections.abc import Sequence
from inspect import isawaitable
from math import ceil, inf

from resilience import wire
from resilience.admission import Admission
from resilience.call import Call
from resilience.decisions.quota import Quota, Usage
from resilience.errors import ConfigurationError, StoreUnavailableError
from resilience.policies.outage import Outage
from resilience.policies.permits import PermitHolder
from resilience.policies.rule import OnOutage, Rule
from resilience.stores.base import RateLimitStore, Want
from resilience.stores.memory import MemoryStore
from resilience.verdict import PROCEED, Reject, Verdict
from resilience.wire import Reason

_TOLD = frozenset({wire.LIMIT, wire.REMAINING, wire.RESET, wire.RATELIMIT_POLICY, wire.RATELIMIT})
_MEANWHILE = {"open": "not enforced", "closed": "refusing every call", "local": "counted by each process alone"}
_TRY_AGAIN = 1.0  # Seconds that a caller is asked to wait when the store is gone.


class RateLimitPolicy:
    """Holds every call to the rules that concern it: all of them at once, in one step of the store.

    A call that one rule denies takes nothing from any other.

    Args:
        store: where the counts are.
        rules: a ``Rule``, its quota's text (``"100/minute"``, ``"10/second and 1000/hour"``), or several.
        on_outage: what callers see while the store is gone, where their rule does not say: ``open`` lets them
            in, ``closed`` refuses them with ``store_unavailable``, ``local`` counts in this process's memory.
        replicas: how many processes share the limits, at least 1: each one's part of a limit while it counts locally.

    Raises:
        ConfigurationError: two rules have one name, or a value is out of range.
    """

    def __init__(
        self,
        store: RateLimitStore,
        rules: Rule | str | Sequence[Rule | str],
        *,
        on_outage: OnOutage = "open",
        replicas: int = 1,
    ) -> None:
        given = [rules] if isinstance(rules, Rule | str) else rules
        self.rules = tuple(rule for item in given for rule in _rules(item))
        self.operations = frozenset().union(*(rule.operations or () for rule in self.rules))
        self._store = store
        self._permits = PermitHolder(store, self.rules)
        self._local: tuple[MemoryStore, PermitHolder] | None = None
        self._shares = {rule.name: _share(rule.quota, replicas) for rule in self.rules}
        self._on_outage = {rule.name: rule.on_outage or on_outage for rule in self.rules}
        ways = sorted({_MEANWHILE[way] for way in self._on_outage.values()})
        self._outage = Outage(f"rate limits are {' or '.join(ways)}")
        self._policy_field = wire.policy_field([(rule.name, rule.quota) for rule in self.rules])
        names = [rule.name for rule in self.rules]
        if not names or len(set(names)) != len(names):
            raise ConfigurationError(f"A rate limit needs at least one rule, each with a name of its own, not {names}.")

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Take what the call costs, or refuse it."""
        wants = []
        token = self._permits.token()
        for rule in self.rules:
            if rule.operations is not None and call.operation not in rule.operations:
                continue
            subject = rule.key(call, admission)
            if not isinstance(subject, str) and isawaitable(subject):
                subject = await subject
            if subject is not None:
                wants.append(Want(rule.name, subject, rule.quota, rule.cost, token))
        if not wants:
            return PROCEED
        try:
            usages = await self._store.acquire(wants)
        except StoreUnavailableError as error:
            self._outage.began(error)
            return await self._without_store(wants, admission)
        self._outage.ended()
        return self._judge(wants, usages, admission, self._permits)

    async def _without_store(self, wants: Sequence[Want], admission: Admission) -> Verdict:
        ways = {self._on_outage[want.rule] for want in wants}
        if "closed" in ways:
            return Reject(Reason.STORE_UNAVAILABLE, "The service can't check its limits right now", _TRY_AGAIN)
        local = [
            want._replace(quota=self._shares[want.rule]) for want in wants if self._on_outage[want.rule] == "local"
        ]
        if not local:
            return PROCEED
        if self._local is None:
            memory = MemoryStore()
            self._local = memory, PermitHolder(memory, self.rules)
        memory, permits = self._local
        return self._judge(local, await memory.acquire(local), admission, permits)

    def _judge(
        self, wants: Sequence[Want], usages: Sequence[Usage], admission: Admission, permits: PermitHolder
    ) -> Verdict:
        limits = admission.limits
        earlier = bool(limits)
        for want, usage in zip(wants, usages, strict=True):
            limits.append((want.rule, want.quota, usage))
        if earlier:
            # Another policy has told of its rules: what follows speaks for both.
            admission.metadata[:] = [pair for pair in admission.metadata if pair[0] not in _TOLD]
        admission.metadata += self._told(limits)
        denied = [usage for usage in usages if not usage.allowed]
        if not denied:
            permits.hold(wants, admission)
            return PROCEED
        retry_after = max(usage.retry_after for usage in denied)
        return Reject(Reason.RATE_LIMITED, "Too many requests", None if retry_after == inf else retry_after)

    def _told(self, limits: Sequence[tuple[str, Quota, Usage]]) -> tuple[tuple[str, str], ...]:
        """Return what a reply says of its limits; the classic three speak of the rule that is nearest to its end."""
        tight = limits[0][2] if len(limits) == 1 else min((usage for _, _, usage in limits), key=_slack)
        policy = self._policy_field
        if len(limits) != len(self.rules) or limits[0][1] is not self.rules[0].quota:
            policy = wire.policy_field([(name, quota) for name, quota, _ in limits])
        return (
            (wire.LIMIT, str(tight.limit)),
            (wire.REMAINING, str(tight.remaining)),
            (wire.RESET, str(ceil(tight.reset_after))),
            (wire.RATELIMIT_POLICY, policy),
            (wire.RATELIMIT, wire.usage_field([(name, usage) for name, _, usage in limits])),
        )


def _rules(item: Rule | str) -> tuple[Rule, ...]:
    return (item,) if isinstance(item, Rule) else tuple(Rule(quota) for quota in Quota.parse(item))


def _share(quota: Quota, replicas: int) -> Quota:
    """Return one process's part of a quota: rounded down, but at least 1, so that nobody is locked out."""
    if replicas < 1:
        raise ConfigurationError(f"replicas must be at least 1, not {replicas}.")
    limit = max(1, quota.limit // replicas)
    if quota.calendar is not None:
        return Quota(limit, calendar=quota.calendar)
    burst = None if quota.burst is None else max(1, min(quota.burst // replicas, limit))
    return Quota(limit, quota.per, algorithm=quota.algorithm, burst=burst)


def _slack(usage: Usage) -> tuple[bool, float, float]:
    return usage.allowed, usage.remaining / usage.limit, -usage.retry_after
