"""Floor 2: so much and no more, told to the caller in every reply."""

import logging
from collections.abc import Sequence
from inspect import isawaitable
from math import ceil, inf
from typing import Literal

from resilience import wire
from resilience.admission import Admission
from resilience.call import Call
from resilience.decisions.quota import Quota, Usage
from resilience.errors import ConfigurationError, StoreUnavailableError
from resilience.policies.rule import Rule
from resilience.stores.base import RateLimitStore, Want
from resilience.verdict import PROCEED, Reject, Verdict
from resilience.wire import Reason

logger = logging.getLogger("resilience")

_TRY_AGAIN = 1.0  # Seconds that a caller is asked to wait when the store is gone.


class RateLimitPolicy:
    """Holds every call to the rules that concern it: all of them at once, in one step of the store.

    A call that one rule denies takes nothing from any other.

    Args:
        store: where the counts are.
        rules: a ``Rule``, its quota's text (``"100/minute"``, ``"10/second and 1000/hour"``), or several.
        on_outage: what callers see while the store is gone: ``open`` lets them in, ``closed`` refuses them
            with ``store_unavailable``.

    Raises:
        ConfigurationError: two rules have one name.
    """

    def __init__(
        self,
        store: RateLimitStore,
        rules: Rule | str | Sequence[Rule | str],
        *,
        on_outage: Literal["open", "closed"] = "open",
    ) -> None:
        given = [rules] if isinstance(rules, Rule | str) else rules
        self.rules = tuple(rule for item in given for rule in _rules(item))
        self.operations = frozenset().union(*(rule.operations or () for rule in self.rules))
        self._store = store
        self._on_outage = on_outage
        self._policy_field = wire.policy_field([(rule.name, rule.quota) for rule in self.rules])
        names = [rule.name for rule in self.rules]
        if not names or len(set(names)) != len(names):
            raise ConfigurationError(
                f"A rate limit needs at least one rule, and a name of its own for each; got {names}."
            )

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Take what the call costs, or refuse it."""
        wants = []
        for rule in self.rules:
            if rule.operations is not None and call.operation not in rule.operations:
                continue
            subject = rule.key(call, admission)
            if not isinstance(subject, str) and isawaitable(subject):
                subject = await subject
            if subject is not None:
                wants.append(Want(rule.name, subject, rule.quota, rule.cost))
        if not wants:
            return PROCEED
        try:
            usages = await self._store.acquire(wants)
        except StoreUnavailableError as error:
            return self._without_store(error)
        admission.metadata += self._told(wants, usages)
        denied = [usage for usage in usages if not usage.allowed]
        if not denied:
            return PROCEED
        retry_after = max(usage.retry_after for usage in denied)
        return Reject(Reason.RATE_LIMITED, "Too many requests", None if retry_after == inf else retry_after)

    def _told(self, wants: Sequence[Want], usages: Sequence[Usage]) -> tuple[tuple[str, str], ...]:
        """Return what a reply says of its limits; the classic three speak of the rule that is nearest to its end."""
        tight = usages[0] if len(usages) == 1 else min(usages, key=_slack)
        policy = self._policy_field
        if len(wants) != len(self.rules):
            policy = wire.policy_field([(want.rule, want.quota) for want in wants])
        return (
            (wire.LIMIT, str(tight.limit)),
            (wire.REMAINING, str(tight.remaining)),
            (wire.RESET, str(ceil(tight.reset_after))),
            (wire.RATELIMIT_POLICY, policy),
            (wire.RATELIMIT, wire.usage_field([(want.rule, usage) for want, usage in zip(wants, usages, strict=True)])),
        )

    def _without_store(self, error: StoreUnavailableError) -> Verdict:
        logger.warning("Rate limits are %s: %s", "not enforced" if self._on_outage == "open" else "refusing", error)
        if self._on_outage == "open":
            return PROCEED
        return Reject(Reason.STORE_UNAVAILABLE, "The service can't check its limits right now", _TRY_AGAIN)


def _rules(item: Rule | str) -> tuple[Rule, ...]:
    return (item,) if isinstance(item, Rule) else tuple(Rule(quota) for quota in Quota.parse(item))


def _slack(usage: Usage) -> tuple[bool, float, float]:
    return usage.allowed, usage.remaining / usage.limit, -usage.retry_after
