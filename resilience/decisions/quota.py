"""Ground floor: how much is allowed, and what is left of it. Values only."""

import re
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, NamedTuple, get_args

from resilience.errors import ConfigurationError

_PERIODS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_SHORT = {"s": "second", "m": "minute", "h": "hour", "d": "day"}
_TEXT = re.compile(
    r"(?P<limit>\d{1,10})\s*(?:/|per)\s*(?P<count>\d{1,6})?\s*(?P<unit>seconds?|minutes?|hours?|days?|s|m|h|d)"
)


Algorithm = Literal["sliding_window", "sliding_log", "token_bucket", "fixed_window", "concurrency"]

PARTS = 30
"""How many parts the ``sliding_window`` cuts its window into."""

_LONGEST_LOG = 256
_FASTEST_BUCKET = 100_000
_CALENDAR = {"day": 86400.0, "month": 31 * 86400.0}


@dataclass(frozen=True, slots=True)
class Quota:
    """At most ``limit`` units in ``per`` seconds.

    Args:
        limit: units, 1 to 2**31 - 1.
        per: the window in seconds, 0.001 to 366 days; left out where there is a ``calendar``.
        algorithm: ``sliding_window`` never admits more than the limit in any window, in O(1) memory. ``sliding_log``
            the same, exactly, for limits up to 256. ``token_bucket`` admits ``burst`` at once and then one unit each
            ``per / limit`` seconds (GCRA). ``fixed_window`` starts anew at each multiple of ``per``, and so admits up
            to twice the limit around one. ``concurrency`` admits ``limit`` calls at once; ``per`` is the lease after
            which a dead worker's calls no longer count, at least 1, renewed while a call runs.
        burst: units that a full token bucket holds, 1 to ``limit``; for ``token_bucket`` alone, which has no default.
        calendar: ``day`` or ``month``, in UTC: a fixed window that starts with it.

    Raises:
        ConfigurationError: a value is out of range, or has no meaning for the algorithm.
    """

    limit: int
    per: float = 0.0
    algorithm: Algorithm = field(default="sliding_window", kw_only=True)
    burst: int | None = field(default=None, kw_only=True)
    calendar: Literal["day", "month"] | None = field(default=None, kw_only=True)
    name: str = field(init=False, compare=False)
    """``"100/minute"``, ``"5/10s"``: how the quota is written and, by default, called."""
    window_us: int = field(init=False, repr=False, compare=False)
    step_us: int = field(init=False, repr=False, compare=False)
    """Microseconds of one part of a sliding window, between two entries of a log, between two units of a bucket."""
    identity: str = field(init=False, repr=False, compare=False)
    """What tells it from another quota of the same name, in one short text."""

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or not 1 <= self.limit < 2**31:
            raise ConfigurationError(f"A quota's limit must be a whole number, 1 to {2**31 - 1}, not {self.limit!r}.")
        if self.calendar is not None:
            if self.calendar not in _CALENDAR or self.per or self.algorithm not in ("sliding_window", "fixed_window"):
                raise ConfigurationError("A calendar is 'day' or 'month', and stands for the window and the algorithm.")
            self._set("algorithm", "fixed_window")
            self._set("per", _CALENDAR[self.calendar])
        if not isfinite(self.per) or not 0.001 <= self.per <= 366 * 86400:
            raise ConfigurationError(f"A quota's window must be 0.001 to {366 * 86400} seconds, not {self.per!r}.")
        self._check_algorithm()
        written = next((name for name, seconds in _PERIODS.items() if seconds == self.per), f"{self.per:g}s")
        period: str = self.calendar or written
        self._set("name", f"{self.limit} at once" if self.algorithm == "concurrency" else f"{self.limit}/{period}")
        window_us = round(self.per * 1_000_000)
        shares = {"sliding_window": PARTS, "token_bucket": self.limit, "sliding_log": window_us}
        self._set("window_us", window_us)
        self._set("step_us", -(-window_us // shares.get(self.algorithm, 1)))
        self._set("identity", f"{self.algorithm}:{self.limit}:{window_us}:{self.capacity}:{self.calendar}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_algorithm(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ConfigurationError(f"{self.algorithm!r} is none of {', '.join(get_args(Algorithm))}.")
        if self.algorithm == "sliding_log" and self.limit > _LONGEST_LOG:
            raise ConfigurationError(
                f"A sliding_log keeps every request, so its limit is at most {_LONGEST_LOG}, not {self.limit}. "
                "Use sliding_window, which keeps the same promise for any limit."
            )
        if self.algorithm == "token_bucket" and not (self.burst is not None and 1 <= self.burst <= self.limit):
            raise ConfigurationError(
                f"A token_bucket needs a burst of 1 to its limit ({self.limit}), not {self.burst!r}: "
                "what it admits at once, beside its steady rate."
            )
        if self.algorithm == "token_bucket" and self.limit > self.per * _FASTEST_BUCKET:
            raise ConfigurationError(f"A token_bucket counts whole microseconds: at most {_FASTEST_BUCKET} a second.")
        if self.algorithm == "concurrency" and self.per < 1:
            raise ConfigurationError(f"The lease of a concurrency limit must be at least 1 second, not {self.per:g}.")
        if self.algorithm != "token_bucket" and self.burst is not None:
            raise ConfigurationError(f"Only a token_bucket has a burst; this quota is a {self.algorithm}.")

    @property
    def capacity(self) -> int:
        """The most units that can be free: the burst of a token bucket, else the limit."""
        return self.limit if self.burst is None else self.burst

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
        limit: the most units that can be free.
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

    @property
    def slack(self) -> tuple[bool, float, float]:
        """How far it is from its end, for comparing: the least of several is the tightest."""
        return self.allowed, self.remaining / self.limit, -self.retry_after
