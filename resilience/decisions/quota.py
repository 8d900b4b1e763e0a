"""Ground floor: how much is allowed, and what is left of it. Values only."""

import re
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

from resilience.errors import ConfigurationError

_PERIODS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_SHORT = {"s": "second", "m": "minute", "h": "hour", "d": "day"}
_TEXT = re.compile(
    r"(?P<limit>\d{1,10})\s*(?:/|per)\s*(?P<count>\d{1,6})?\s*(?P<unit>seconds?|minutes?|hours?|days?|s|m|h|d)"
)


@dataclass(frozen=True, slots=True)
class Quota:
    """At most ``limit`` units in any ``per`` seconds.

    Args:
        limit: units, 1 to 2**31 - 1.
        per: the window in seconds, at least 0.001 and at most 366 days.

    Raises:
        ConfigurationError: a value is out of range.
    """

    limit: int
    per: float
    name: str = field(init=False, compare=False)
    """``"100/minute"``, ``"5/10s"``: how the quota is written and, by default, called."""

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or not 1 <= self.limit < 2**31:
            raise ConfigurationError(
                f"A quota's limit must be a whole number from 1 to {2**31 - 1}, not {self.limit!r}."
            )
        if not isfinite(self.per) or not 0.001 <= self.per <= 366 * 86400:
            raise ConfigurationError(f"A quota's window must be 0.001 to {366 * 86400} seconds, not {self.per!r}.")
        period = next((name for name, seconds in _PERIODS.items() if seconds == self.per), f"{self.per:g}s")
        object.__setattr__(self, "name", f"{self.limit}/{period}")

    @classmethod
    def parse(cls, text: str) -> "tuple[Quota, ...]":
        """Read ``"100/minute"``, ``"5 per 10 seconds"``, or several joined by ``and`` or ``;``.

        Raises:
            ConfigurationError: the text is none of these; the message shows the form.
        """
        return tuple(_parse_one(part) for part in re.split(r"\s+and\s+|\s*;\s*", text.strip()))


def _parse_one(text: str) -> Quota:
    match = _TEXT.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigurationError(f'{text!r} is not a quota. Write "100/minute", "5/10s" or "10/second and 1000/hour".')
    unit = match["unit"].rstrip("s") or "s"
    return Quota(int(match["limit"]), int(match["count"] or 1) * _PERIODS[_SHORT.get(unit, unit)])


class Usage(NamedTuple):
    """What one quota said to one request.

    Args:
        allowed: whether the units asked for fit.
        limit: the quota's limit.
        remaining: units still free after this request, never below 0.
        reset_after: seconds until more units are free; 0 when all of them are.
        retry_after: seconds until the same request fits if nothing else is admitted meanwhile; 0 when allowed;
            ``inf`` when it asks for more than the limit.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_after: float
    retry_after: float
