"""Floor 2: the permits of running calls: renewed while they run, given back when they end."""

from collections.abc import Sequence
from secrets import token_hex

from resilience.admission import Admission
from resilience.errors import StoreUnavailableError
from resilience.policies.heartbeat import Heartbeat
from resilience.policies.rule import Rule
from resilience.stores.base import RateLimitStore, Want
from resilience.verdict import Outcome


class PermitHolder:
    """Holds the ``concurrency`` permits of a policy's calls in one store.

    Args:
        store: where they are counted.
        rules: the policy's; the shortest lease among them sets the pace.
    """

    def __init__(self, store: RateLimitStore, rules: Sequence[Rule]) -> None:
        leases = [rule.quota.per for rule in rules if rule.quota.algorithm == "concurrency"]
        self._store = store
        self._held: dict[str, list[Want]] = {}
        self._heartbeat = Heartbeat(self, min(leases), min(leases)) if leases else None

    def token(self) -> str:
        """Return a token for one call; empty where no rule needs one."""
        return token_hex(8) if self._heartbeat is not None else ""

    def hold(self, wants: Sequence[Want], admission: Admission) -> None:
        """Keep the permits among ``wants``, which were just taken, until the call ends."""
        permits = [want for want in wants if want.quota.algorithm == "concurrency"]
        if self._heartbeat is None or not permits:
            return
        token = permits[0].token
        self._held[token] = permits
        self._heartbeat.hold(token, token)

        async def give_back(_outcome: Outcome) -> None:
            await self._give_back(token)

        admission.on_settle(give_back)

    async def renew(self, key: str, token: str, *, lease: float, ttl: float) -> bool:  # noqa: ARG002 - each quota has its own
        """Extend the leases of one call's permits: its holder asks for them again."""
        permits = self._held.get(key)
        return permits is not None and all(usage.allowed for usage in await self._store.acquire(permits))

    async def _give_back(self, token: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.drop(token)
        try:
            await self._store.free(self._held.pop(token))
        except StoreUnavailableError:
            pass  # their leases run out
