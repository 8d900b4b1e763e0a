"""Floor 2: which policies are asked at the edge, and which at the core."""

from collections.abc import Sequence

from resilience.admission import Policy
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.selective import Selective


def split_stages(policies: Sequence[Policy]) -> tuple[tuple[Policy, ...], tuple[Policy, ...]]:
    """Return what of ``policies`` is asked at the edge, and what at the core, each in the order given.

    A rate limit that has rules for both becomes two; every other policy is the core's.
    """
    pairs = [_split(policy) for policy in policies]
    edge = tuple(early for early, _ in pairs if early is not None)
    return edge, tuple(late for _, late in pairs if late is not None)


def _split(policy: Policy) -> tuple[Policy | None, Policy | None]:
    if isinstance(policy, RateLimitPolicy):
        return policy.at_edge(), policy.at_core()
    if isinstance(policy, Selective):
        early, late = _split(policy.policy)
        if early is not None:
            return Selective(early, policy.operations), late and Selective(late, policy.operations)
    return None, policy
