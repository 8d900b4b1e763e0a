"""Floor 2: apply a policy here, and not there."""

from collections.abc import Iterable
from typing import Any

from resilience import wire
from resilience.admission import Admission, Policy
from resilience.call import Call
from resilience.verdict import PROCEED, Verdict


class Selective:
    """A policy for the named operations only.

    Args:
        policy: asked for these. One that has nothing to say of a call without a certain metadata names it as
            ``needs``, and is not asked of such a call.
        operations: ``"POST /orders/{id}"`` or ``"/pkg.Service/Method"``. One that its door does not
            know stops the service from starting.
    """

    def __init__(self, policy: Policy, operations: Iterable[str]) -> None:
        self.policy = policy
        self.operations = frozenset(operations)
        self._needs: str | None = getattr(policy, "needs", None)
        self._needs_sent = self._needs in wire.SENT

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Ask the policy, if the call is one of its operations."""
        # Cheaper to find out than what the call's operation is.
        if self._needs_sent:
            if self._needs not in call.metadata.sent:
                return PROCEED
        elif self._needs is not None and call.metadata.get(self._needs) is None:
            return PROCEED
        if call.operation in self.operations:
            return await self.policy.admit(call, admission)
        return PROCEED


def declared_operations(policy: Policy) -> frozenset[str]:
    """Return the operations that a policy names; empty where it takes whatever comes."""
    operations: frozenset[str] = getattr(policy, "operations", frozenset())
    return operations


def store_of(policy: Policy) -> Any:
    """Return the store that a policy uses, or None where it has none."""
    return getattr(policy, "store", None) or getattr(getattr(policy, "policy", None), "store", None)
