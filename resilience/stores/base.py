"""Floor 1: what a store promises. ``resilience.testing.StoreContract`` holds every store to it.

Every method answers within the store's own deadline or raises ``StoreUnavailableError``. A method that writes
finishes although its caller is cancelled: an answer that left must be found again.
"""

from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol

from resilience.decisions.idempotency import Claim, Takeover
from resilience.decisions.idempotency_record import Standing
from resilience.decisions.quota import Quota, Usage
from resilience.verdict import Reply


class Want(NamedTuple):
    """Units of one quota that a call asks for.

    Args:
        rule: the rule's name; rules of one name and one subject share their count.
        subject: who it is counted for.
        quota: limit and window.
        cost: units, at least 0; 0 only looks.
        token: who holds the permit, for a quota of ``concurrency``; unique to the call.
    """

    rule: str
    subject: str
    quota: Quota
    cost: int
    token: str = ""


def total_costs(wants: Sequence[Want]) -> list[int]:
    """Return for each want what all wants for its count cost together: a count asked twice is asked once, for both."""
    if len(wants) == 1:
        return [wants[0].cost]
    totals: dict[tuple[str, str], int] = {}
    for want in wants:
        key = want.rule, want.subject
        totals[key] = totals.get(key, 0) + want.cost
    return [totals[want.rule, want.subject] for want in wants]


class RateLimitStore(Protocol):
    """Counts units."""

    def acquire(self, wants: Sequence[Want]) -> Awaitable[Sequence[Usage]]:
        """Take all that is wanted or nothing of it, in one atomic step; answer each want in order.

        Where one is denied, the others say what they would have said, and nothing is counted.
        """
        ...

    async def free(self, wants: Sequence[Want]) -> None:
        """Give permits of ``concurrency`` quotas back; wants of other quotas keep what they took."""
        ...

    async def reset(self, rule: str, subject: str) -> None:
        """Forget what one subject used of one rule."""
        ...


class IdempotencyStore(Protocol):
    """Remembers which operations run and ran. Keys come from ``decisions.idempotency.record_key``.

    What each command does in each state is the table of ``decisions.idempotency_table``.
    """

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        """Ask to run the operation under ``key``.

        Args:
            token: the claimant's own; a repeated claim with it is granted again.
            lease: seconds until an owner that does not renew counts as gone.
            ttl: seconds that the record is kept, at least ``lease``.
            takeover: what to do with a record whose lease is out.
        """
        ...

    async def renew(self, key: str, token: str, *, lease: float, ttl: float) -> bool:
        """Extend the owner's lease; False where the key is no longer the token's to renew."""
        ...

    async def complete(
        self, key: str, token: str, fingerprint: bytes, reply: Reply | None, *, ttl: float, tombstone: float = 0.0
    ) -> bool:
        """Keep the answer for ``ttl`` seconds; ``reply`` is None where it can't be shown again.

        False where somebody else owns the key: their record stays. A lost record is restored.

        Args:
            tombstone: seconds for which the key is remembered after the ttl: a claim then meets ``Expired``.
        """
        ...

    async def release(self, key: str, token: str) -> bool:
        """Free the key so that a retry runs; False where it is not the token's to free.

        The retry may have another payload. Where the token had taken the key over, the retry's epoch is higher yet.
        """
        ...

    async def inspect(self, key: str) -> Standing | None:
        """Tell how the record stands, for an operator; None where there is none."""
        ...

    async def forget(self, key: str) -> bool:
        """Free the key for good, for an operator; False where there is nothing, or a live owner has it.

        The next claim is the first again, with epoch 1, whatever ran before.
        """
        ...

    async def resolve(self, key: str, reply: Reply | None, *, ttl: float, tombstone: float = 0.0) -> bool:
        """Answer for an owner that is gone, as an operator: the operation is done, with this reply.

        The fingerprint stays and the epoch rises; the lost owner, should it come back, can no longer complete. True
        also where the same answer was given before. False where there is nothing to answer for, a live owner has it, or
        it was answered otherwise.
        """
        ...


class Store(RateLimitStore, IdempotencyStore, Protocol):
    """Both, in one place, with one life."""

    async def aclose(self) -> None:
        """Let go of what the store holds open. A closed store may refuse every call."""
        ...
