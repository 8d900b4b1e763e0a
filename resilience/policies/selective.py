"""Floor 2: apply a policy here, and not there."""

from collections.abc import Iterable
from typing import Any

from resilience.admission import Admission, Policy
from resilience.call import Call
from resilience.verdict import PROCEED, Verdict


class Selective:
    """A policy for the named operations only.

    Args:
        policy: asked for these.
        operations: ``"POST /orders/{id}"`` or ``"/pkg.Service/Method"``. One that its door does not
            know stops the service from starting.
    """

    def __init__(self, policy: Policy, operations: Iterable[str]) -> None:
        self.policy = policy
        self.operations = frozenset(operations)

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Ask the policy, if the call is one of its operations."""
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
