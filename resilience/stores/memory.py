"""Floor 1: the embedded default. One process, no tasks, no threads; every method runs without a pause.

Bounded in both halves, and the halves differ at the bound. A count may be forgotten: of a few old ones the least used
goes, so that a flood of new callers hardly frees one who is over the limit. A record may not: a new claim is refused.
"""

import logging
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from multiprocessing import parent_process
from time import monotonic, time

from resilience.decisions import concurrency
from resilience.decisions.algorithm import ALGORITHMS
from resilience.decisions.quota import Quota, Usage
from resilience.errors import ConfigurationError
from resilience.stores.base import Want, total_costs
from resilience.stores.memory_records import MemoryRecords

logger = logging.getLogger("resilience")

_LOOKED_AT = 4  # Old entries that each new one looks at: expiry keeps pace with growth, at a flat cost.


class MemoryStore(MemoryRecords):
    """Counts and records in this process's memory. Several processes each count alone.

    Args:
        max_subjects: how many (rule, subject) counts to hold, at least 1; about 0.4 KB each, 0.9 KB at most.
        max_record_bytes: how much the idempotency records may take, in bytes.
        clock: seconds that never step back. The default is the time of day when the store was made, and steady
            from then on, so that calendar windows start when they should and no correction of the clock moves a lease.

    Raises:
        ConfigurationError: a bound is out of range.
    """

    def __init__(
        self,
        *,
        max_subjects: int = 1_000_000,
        max_record_bytes: int = 256 * 2**20,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if max_subjects < 1 or max_record_bytes < 0:
            raise ConfigurationError("max_subjects must be at least 1, and max_record_bytes at least 0.")
        self._max_subjects = max_subjects
        super().__init__(clock or _steady_clock(), max_record_bytes)
        _tell_workers()
        # Ordered by when an entry was last looked at, so that a look takes from the front. Not a dict: that steps over
        # every entry which has left its front, each time.
        self._counts: OrderedDict[tuple[str, str], tuple[Quota, array[int]]] = OrderedDict()
        self._permits: dict[tuple[str, str], concurrency.Permits] = {}

    async def acquire(self, wants: Sequence[Want]) -> Sequence[Usage]:
        """Take all that is wanted or nothing of it. See ``RateLimitStore``."""
        now = self._clock()
        if len(wants) == 1:  # nearly every call
            return [self._take(wants[0], now)]
        usages = []
        denied = False
        for want, cost in zip(wants, total_costs(wants), strict=True):
            usage = self._decide(want, cost, now)
            denied = denied or not usage.allowed
            usages.append(usage)
        if not denied:
            for want in wants:
                self._charge(want, now)
        return usages

    async def free(self, wants: Sequence[Want]) -> None:
        """Give permits of ``concurrency`` quotas back. See ``RateLimitStore``."""
        for rule, subject, quota, _, token in wants:
            permits = self._permits.get((rule, subject), {}) if quota.algorithm == "concurrency" else {}
            if permits and token in permits:
                del permits[token]
                if not permits:
                    del self._permits[rule, subject]

    async def reset(self, rule: str, subject: str) -> None:
        """Forget what one subject used of one rule."""
        self._counts.pop((rule, subject), None)
        self._permits.pop((rule, subject), None)

    def _take(self, want: Want, now: float) -> Usage:
        rule, subject, quota, cost, _ = want
        held = self._counts.get((rule, subject))
        if held is None or held[0] is not quota or not cost:
            usage = self._decide(want, cost, now)
            if usage.allowed:
                self._charge(want, now)
            return usage
        # Somebody seen before, under the same quota: what is held is found once for both halves.
        return ALGORITHMS[quota.algorithm].take(held[1], quota, cost, now)

    def _decide(self, want: Want, cost: int, now: float) -> Usage:
        if want.quota.algorithm == "concurrency":
            permits = self._permits.get((want.rule, want.subject), {})
            return concurrency.decide(permits, want.quota, want.token, cost, now)
        functions = ALGORITHMS[want.quota.algorithm]
        held = self._held(want)
        return functions.decide(held[1] if held is not None else functions.empty(), want.quota, cost, now)

    def _charge(self, want: Want, now: float) -> None:
        if not want.cost:
            return
        key = (want.rule, want.subject)
        if want.quota.algorithm == "concurrency":
            concurrency.charge(self._permits.setdefault(key, {}), want.quota, want.token, now)
            return
        held = self._held(want)
        functions = ALGORITHMS[want.quota.algorithm]
        if held is None:
            self._make_room(now)
            held = self._counts[key] = (want.quota, functions.empty())
        elif held[0] is not want.quota:
            held = self._counts[key] = (want.quota, held[1])  # another tier: its window says how long to keep
        functions.charge(held[1], want.quota, want.cost, now)

    def _held(self, want: Want) -> "tuple[Quota, array[int]] | None":
        held = self._counts.get((want.rule, want.subject))
        if held is None or held[0] is want.quota:
            return held
        # A rule that has changed its algorithm starts anew.
        return held if ALGORITHMS[held[0].algorithm] is ALGORITHMS[want.quota.algorithm] else None

    def _make_room(self, now: float) -> None:
        counts = self._counts
        oldest = list(islice(counts, _LOOKED_AT))
        for key in oldest:
            quota, state = counts[key]
            if ALGORITHMS[quota.algorithm].expires_at(state, quota) > now:
                counts.move_to_end(key)
            else:
                del counts[key]
        if len(counts) >= self._max_subjects:
            # Of those just looked at, the one that has the least to lose.
            del counts[min(islice(reversed(counts), _LOOKED_AT), key=lambda key: self._used_share(key, now))]

    def _used_share(self, key: tuple[str, str], now: float) -> float:
        quota, state = self._counts[key]
        return ALGORITHMS[quota.algorithm].used_share(state, quota, now)

    async def aclose(self) -> None:
        """Do nothing: there is nothing to let go of."""


@cache
def _tell_workers() -> None:
    """Say, once in a process, that it is one of several and counts alone."""
    several = os.environ.get("WEB_CONCURRENCY", "1")
    if parent_process() is not None or (several.isdecimal() and int(several) > 1):
        logger.warning(
            "This is one of several workers, and each counts alone in its own memory: a limit of 100 is 100 for each, "
            "and a key is known to one. Set REDIS_URL, or give the policies a RedisStore."
        )


def _steady_clock() -> Callable[[], float]:
    origin = time() - monotonic()
    return lambda: origin + monotonic()
