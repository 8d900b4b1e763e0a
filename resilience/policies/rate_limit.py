"""Floor 2: so much and no more, told to the caller in every reply."""

from collections.abc import Sequence
from functools import lru_cache
from math import inf

from resilience import wire
from resilience.admission import Admission
from resilience.call import Call
from resilience.decisions.quota import Quota, Usage
from resilience.errors import ConfigurationError, PayloadTooLargeError, StoreUnavailableError
from resilience.policies.outage import Outage
from resilience.policies.permits import PermitHolder
from resilience.policies.rule import OnOutage, Rule, Stage
from resilience.policies.shadow import ShadowRule
from resilience.policies.wants import plain_wants, wants_of
from resilience.stores.base import RateLimitStore, Want
from resilience.stores.memory import MemoryStore
from resilience.verdict import PROCEED, Reject, Verdict
from resilience.wire import Reason

_TOLD = frozenset({wire.LIMIT, wire.REMAINING, wire.RESET, wire.RATELIMIT_POLICY, wire.RATELIMIT})
_MEANWHILE = {"open": "not enforced", "closed": "refusing every call", "local": "counted by each process alone"}
_TRY_AGAIN = 1.0  # Seconds that a caller is asked to wait when the store is gone.
_SHARES = 1024  # Quotas whose part for one process is remembered.


class RateLimitPolicy:
    """Holds every call to the rules that concern it: all of them at once, in one step of the store.

    A call that one rule denies takes nothing from any other. Rules in shadow are asked after these, each
    in a step of its own, of calls that were let in.

    A pipeline asks the rules of each stage at their stage. A policy that is asked without one, or was put at the edge
    by hand, asks all of its rules where it stands.

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
        names = [rule.name for rule in self.rules]
        if not names or len(set(names)) != len(names):
            raise ConfigurationError(f"A rate limit needs at least one rule, each with a name of its own, not {names}.")
        if replicas < 1:
            raise ConfigurationError(f"replicas must be at least 1, not {replicas}.")
        self.store = store
        self._asked = tuple(rule for rule in self.rules if not rule.shadow)
        self._shadows = tuple(ShadowRule(store, rule) for rule in self.rules if rule.shadow)
        self._holders = [rule for rule in self._asked if not rule.tiered]
        self._permits = PermitHolder(store, self._holders)
        self._plain = all(rule.plain for rule in self._asked)
        self._local: tuple[MemoryStore, PermitHolder] | None = None
        self._replicas = replicas
        self.on_outage: OnOutage = on_outage
        self._on_outage = {rule.name: rule.on_outage or on_outage for rule in self.rules}
        ways = sorted({_MEANWHILE[self._on_outage[rule.name]] for rule in self._asked})
        self._outage = Outage(f"rate limits are {' or '.join(ways)}")
        self._policy_field: str | None = None
        if len(self._holders) == len(self._asked):
            self._policy_field = wire.policy_field([(rule.name, rule.quota) for rule in self._asked])

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Take what the call costs, or refuse it."""
        try:
            if self._plain:
                wants = plain_wants(self._asked, call, admission, self._permits.token())
            else:
                wants = await wants_of(self._asked, call, admission, self._permits.token())
        except PayloadTooLargeError as error:
            return _too_large(error)
        if wants:
            try:
                usages = await self.store.acquire(wants)
            except StoreUnavailableError as error:
                self._outage.began(error)
                return await self._without_store(wants, admission)
            self._outage.ended()
            verdict = self._judge(wants, usages, admission, self._permits)
            if verdict is not PROCEED:
                return verdict
        return await self._observe(call, admission) if self._shadows else PROCEED

    async def take(self, wants: Sequence[Want]) -> list[Usage | None]:
        """Take for a call that meets no door: all that is wanted or nothing; None for what nobody counts meanwhile.

        Args:
            wants: of rules of this policy, but not of ``concurrency``: no call ends that would give a permit back.

        Raises:
            StoreUnavailableError: the store is gone, and a rule that is wanted is closed meanwhile.
        """
        try:
            usages = await self.store.acquire(wants)
        except StoreUnavailableError as error:
            self._outage.began(error)
            ways = [self._on_outage[want.rule] for want in wants]
            if "closed" in ways:
                raise
            local = self._local_wants(wants)
            counted = iter(await self._locally()[0].acquire(local) if local else ())
            return [next(counted) if way == "local" else None for way in ways]
        self._outage.ended()
        return list(usages)

    def at_edge(self) -> "RateLimitPolicy | None":
        """Return a policy of the rules that are asked at the edge, or None where there are none."""
        return self._at("edge")

    def at_core(self) -> "RateLimitPolicy | None":
        """Return a policy of the rules that are asked at the core, or None where there are none."""
        return self._at("core")

    async def peek(self, rule: str, subject: str, *, quota: Quota | str | None = None) -> Usage:
        """Return what a subject has left of a rule; takes nothing.

        Args:
            rule: the rule's name.
            subject: whom it counts for, as its key says it: ``"tenant:7"``; for a caller, ``admission.caller()``.
            quota: the subject's own, needed where a function says it.

        Raises:
            ConfigurationError: no rule has this name, or the quota is not known.
            StoreUnavailableError: the store did not answer.
        """
        found = self._rule(rule)
        known = found.quota if quota is None else Rule(quota).quota
        (usage,) = await self.store.acquire([Want(found.name, subject, known, 0)])
        return usage

    async def reset(self, rule: str, subject: str) -> None:
        """Forget what a subject used of a rule. Other processes may deny by what they know for a second more.

        Args:
            rule: the rule's name.
            subject: see ``peek``.

        Raises:
            ConfigurationError: no rule has this name.
            StoreUnavailableError: the store did not answer.
        """
        found = self._rule(rule)
        if self._local is not None:
            await self._local[0].reset(found.name, subject)
        await self.store.reset(found.name, subject)

    def _rule(self, name: str) -> Rule:
        for rule in self.rules:
            if rule.name == name:
                return rule
        raise ConfigurationError(f"No rule is called {name!r}; there are {[rule.name for rule in self.rules]}.")

    def _at(self, stage: Stage) -> "RateLimitPolicy | None":
        rules = [rule for rule in self.rules if rule.stage == stage]
        if len(rules) == len(self.rules):
            return self
        if not rules:
            return None
        return RateLimitPolicy(self.store, rules, on_outage=self.on_outage, replicas=self._replicas)

    async def _observe(self, call: Call, admission: Admission) -> Verdict:
        try:
            for shadow in self._shadows:
                await shadow.observe(call, admission)
        except PayloadTooLargeError as error:
            return _too_large(error)
        return PROCEED

    async def _without_store(self, wants: Sequence[Want], admission: Admission) -> Verdict:
        ways = {self._on_outage[want.rule] for want in wants}
        if "closed" in ways:
            return Reject(Reason.STORE_UNAVAILABLE, "The service can't check its limits right now", _TRY_AGAIN)
        local = self._local_wants(wants)
        if not local:
            return PROCEED
        memory, permits = self._locally()
        return self._judge(local, await memory.acquire(local), admission, permits)

    def _local_wants(self, wants: Sequence[Want]) -> list[Want]:
        return [
            want._replace(quota=_share(want.quota, self._replicas))
            for want in wants
            if self._on_outage[want.rule] == "local"
        ]

    def _locally(self) -> tuple[MemoryStore, PermitHolder]:
        if self._local is None:
            memory = MemoryStore()
            self._local = memory, PermitHolder(memory, self._holders)
        return self._local

    def _judge(
        self, wants: Sequence[Want], usages: Sequence[Usage], admission: Admission, permits: PermitHolder
    ) -> Verdict:
        limits = admission.limits
        field = self._policy_field if len(wants) == len(self._asked) and permits is self._permits else None
        if limits:
            # Another policy has told of its rules: what follows speaks for both.
            admission.metadata[:] = [pair for pair in admission.metadata if pair[0] not in _TOLD]
            field = None
        if len(wants) == 1:  # nearly every call
            ((rule, _, quota, _, _),), (usage,) = wants, usages
            limits += ((rule, quota, usage),)
            allowed = usage.allowed
        else:
            limits += tuple([(want.rule, want.quota, usage) for want, usage in zip(wants, usages, strict=True)])
            allowed = all(usage.allowed for usage in usages)
        admission.limits = limits
        admission.metadata += wire.limit_fields(limits, field)
        if allowed:
            if wants[0].token:
                permits.hold(wants, admission)
            return PROCEED
        retry_after = max(usage.retry_after for usage in usages if not usage.allowed)
        return Reject(Reason.RATE_LIMITED, "Too many requests", None if retry_after == inf else retry_after)


def _too_large(error: PayloadTooLargeError) -> Reject:
    return Reject(Reason.PAYLOAD_TOO_LARGE, f"This request may have {error.limit} bytes")


def _rules(item: Rule | str) -> tuple[Rule, ...]:
    return (item,) if isinstance(item, Rule) else tuple(Rule(quota) for quota in Quota.parse(item))


@lru_cache(_SHARES)
def _share(quota: Quota, replicas: int) -> Quota:
    """Return one process's part of a quota: rounded down, but at least 1, so that nobody is locked out."""
    limit = max(1, quota.limit // replicas)
    if quota.calendar is not None:
        return Quota(limit, calendar=quota.calendar)
    burst = None if quota.burst is None else max(1, min(quota.burst // replicas, limit))
    return Quota(limit, quota.per, algorithm=quota.algorithm, burst=burst)
