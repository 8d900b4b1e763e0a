"""Floor 2: a rate limit on trial: counted like any other, denying nobody."""

import logging
from collections.abc import Callable
from math import inf
from time import monotonic

from resilience.admission import Admission
from resilience.call import Call
from resilience.errors import PayloadTooLargeError, StoreUnavailableError
from resilience.policies.outage import Outage
from resilience.policies.permits import PermitHolder
from resilience.policies.rule import Rule
from resilience.policies.wants import wants_of
from resilience.stores.base import RateLimitStore

logger = logging.getLogger("resilience")

_BETWEEN_LINES = 1.0  # Seconds; a flood of denials must not become a flood of lines.


class ShadowRule:
    """Counts the calls that were let in, and logs how many of them the rule would have denied.

    It has no part in any answer: it tells callers nothing, and no accident of its functions or its store reaches them.

    Args:
        store: where the counts are.
        rule: the rule on trial.
        clock: seconds that never step back, for the pace of the log.
    """

    def __init__(self, store: RateLimitStore, rule: Rule, clock: Callable[[], float] = monotonic) -> None:
        self._store = store
        self._rule = rule
        self._clock = clock
        self._permits = PermitHolder(store, [] if rule.tiered else [rule])
        self._outage = Outage(f"the shadow rule {rule.name!r} is not counted")
        self._denials = 0
        self._told_at = self._failed_at = -inf

    async def observe(self, call: Call, admission: Admission) -> None:
        """Take what the call costs, or note that there was not enough left.

        Raises:
            PayloadTooLargeError: a function of the rule read a payload that is over its own bound. What it read is
                gone, so that the call can't go on.
        """
        try:
            await self._count(call, admission)
        except PayloadTooLargeError:
            raise
        except StoreUnavailableError as error:
            self._outage.began(error)
        except Exception as error:
            self._note_failure(error)
        self._tell()

    async def _count(self, call: Call, admission: Admission) -> None:
        wants = await wants_of((self._rule,), call, admission, self._permits.token())
        if not wants:
            return
        (usage,) = await self._store.acquire(wants)
        self._outage.ended()
        if usage.allowed:
            self._permits.hold(wants, admission)
        else:
            self._denials += 1

    def _tell(self) -> None:
        if not self._denials or self._clock() - self._told_at < _BETWEEN_LINES:
            return
        logger.info(
            "Shadow rule %s would have denied %d calls since it was last told",
            self._rule.name,
            self._denials,
            extra={"rule": self._rule.name, "would_deny": self._denials},
        )
        self._told_at, self._denials = self._clock(), 0

    def _note_failure(self, error: Exception) -> None:
        if self._clock() - self._failed_at >= _BETWEEN_LINES:
            self._failed_at = self._clock()
            # Its kind alone: the text of somebody's exception may quote the call.
            logger.error("Shadow rule %s could not be asked: %s", self._rule.name, type(error).__name__)
