"""Floor 1: rules whose counts are on different servers of a cluster, where no script can see them all.

First a look at all of them, and only if each has room the charge, one server after the other. Never over a limit; but
where another call takes the last unit between the look and the charge, the servers charged before keep their unit.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from resilience.decisions.quota import Usage
from resilience.stores.base import Want

Acquire = Callable[[Sequence[Want]], Awaitable[Sequence[Usage]]]


def subjects_of(wants: Sequence[Want]) -> list[list[Want]]:
    """Return the wants of each subject together: those that one server counts."""
    parts: dict[str, list[Want]] = {}
    for want in wants:
        parts.setdefault(want.subject, []).append(want)
    return list(parts.values())


async def acquire_scattered(wants: Sequence[Want], parts: list[list[Want]], acquire: Acquire) -> Sequence[Usage]:
    """Take all that is wanted of several servers, or tell who denies. Answers in the order of ``wants``."""
    looks = await asyncio.gather(*(acquire([want._replace(cost=0) for want in part]) for part in parts))
    lacking = [
        any(usage.remaining < want.cost for want, usage in zip(part, look, strict=True))
        for part, look in zip(parts, looks, strict=True)
    ]
    said: dict[tuple[str, str], Usage] = {}
    for part, look, lacks in zip(parts, looks, lacking, strict=True):
        # Who lacks is asked in earnest, for the wait; the others only if nobody lacks.
        if lacks or not any(lacking):
            usages = await acquire(part)
        else:
            usages = [
                usage._replace(remaining=usage.remaining - want.cost) for want, usage in zip(part, look, strict=True)
            ]
        said.update(((want.rule, want.subject), usage) for want, usage in zip(part, usages, strict=True))
        if not any(lacking) and not all(usage.allowed for usage in usages):
            break
    return [said.get((want.rule, want.subject)) or _untouched(want) for want in wants]


def _untouched(want: Want) -> Usage:
    """Tell of a rule that was not asked, because one before it denied."""
    return Usage(True, want.quota.capacity, want.quota.capacity - want.cost, want.quota.per, 0.0)
