"""Floor 2: one rate limit, told whole: how much, for whom, at what cost."""

import re
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from inspect import isawaitable
from typing import Any, Literal, get_args

from resilience.admission import Admission
from resilience.call import Call
from resilience.caller import by_address
from resilience.decisions.quota import Quota
from resilience.errors import ConfigurationError

Key = Callable[[Call, Admission], Awaitable[str | None] | str | None]
"""Names whom a call is counted for; None exempts it. A name should say its kind (``"tenant:7"``): rules that
count for the same name share nothing, but people read it."""

QuotaFor = Callable[[Call, Admission], Awaitable[Quota | str | None] | Quota | str | None]
"""Says how much the one who calls may have, as a quota or its text; None exempts the call."""

CostFor = Callable[[Call, Admission], Awaitable[int] | int]
"""Says how many units a call takes, at least 0; 0 only looks."""

OnOutage = Literal["open", "closed", "local"]
"""What callers see while the store is gone: let in, refused, or counted in this process's memory."""

Stage = Literal["core", "edge"]
"""Where a call is asked: at the core the user is known; at the edge nothing has been done for the call yet."""

# What fits a structured-field string without escapes. Source: RFC 8941, 3.3.3.
_NAME = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,128}")
_UNFIT = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")
_TEXTS = 1024  # Texts of quotas that are read once; an application has a few tiers, or a few hundred contracts.


def caller(_call: Call, admission: Admission) -> str:
    """Count for the caller: the authenticated user, else the API key, else the address."""
    return admission.caller()


def address(call: Call, _admission: Admission) -> str:
    """Count for the network address, whoever is behind it; IPv6 by its /64."""
    return by_address(call)


def everyone(_call: Call, _admission: Admission) -> str:
    """Count all callers together."""
    return "all"


class Rule:
    """At most so many units for each one who is counted.

    One rule and one subject have one count, though the quota changes from call to call: whoever moves to a higher tier
    has used what was used, and whoever moves to a lower one may have nothing left. Give all tiers of a rule one
    algorithm and one window: another algorithm starts anew, and another window may lose a part of the count. A token
    bucket keeps the *share* that is used: an empty one stays empty.

    Args:
        quota: ``Quota(100, per=60)``, or its text, ``"100/minute"``; or a function of yours, sync or async, that
            says it for each call, and None for a call that is exempt. A function says no ``concurrency``: permits
            are held by a rule for each tier, whose key is None for the others.
        key: whom it counts for: ``caller`` (the default), ``address``, ``everyone``, or a function of
            yours, sync or async; it answers None for a call that is exempt.
        operations: the operations that draw on it, all on the same count; every one where None.
        cost: units that one call takes, at least 0, or a function of yours, sync or async. What costs 0 only looks.
        on_outage: ``open``, ``closed`` or ``local``; the policy's where None.
        stage: ``edge`` asks before authentication, against floods. The user is not known there: ``caller`` is the
            API key, else the address, and no function can read the payload.
        shadow: count and log what would be denied, but deny nothing and tell callers nothing.
        name: what the rule is called in replies and in the store, unique in its policy. The default is the
            quota's text, or its function's name, and the operations where there are any.

    Raises:
        ConfigurationError: a value is out of range; for a call, where a function's answer is.
    """

    __slots__ = ("_cost", "_quota", "fixed", "key", "name", "on_outage", "operations", "shadow", "stage")

    fixed: tuple[Quota, int] | None
    """The quota and the cost of every call, where no function says either."""

    def __init__(
        self,
        quota: Quota | str | QuotaFor,
        *,
        key: Key = caller,
        operations: Iterable[str] | None = None,
        cost: int | CostFor = 1,
        on_outage: OnOutage | None = None,
        stage: Stage = "core",
        shadow: bool = False,
        name: str | None = None,
    ) -> None:
        if isinstance(quota, str):
            quota = _read(quota)
        if not isinstance(quota, Quota) and not callable(quota):
            raise ConfigurationError(f"A rule's quota is a Quota, its text or a function, not a {_kind(quota)}.")
        if not callable(cost):
            _check_cost("A rule's cost", cost)
        if isinstance(quota, Quota) and quota.algorithm == "concurrency" and cost != 1:
            raise ConfigurationError("A call takes one permit of a concurrency limit: its cost is 1.")
        if stage not in get_args(Stage):
            raise ConfigurationError(f"A rule's stage is 'core' or 'edge', not {stage!r}.")
        self._quota = quota
        self._cost = cost
        self.fixed = (quota, cost) if isinstance(quota, Quota) and not callable(cost) else None
        self.key = key
        self.operations = None if operations is None else frozenset(operations)
        self.on_outage = on_outage
        self.stage = stage
        self.shadow = shadow
        self.name = name or self._derived_name()
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is not a rule's name: use 1 to 128 printable ASCII characters, no quote or backslash."
            )

    @property
    def plain(self) -> bool:
        """Whether nothing that the rule says of a call is said by a function of the application's."""
        return self.fixed is not None and self.key in (caller, address, everyone)

    @property
    def tiered(self) -> bool:
        """Whether a function says the quota."""
        return not isinstance(self._quota, Quota)

    @property
    def quota(self) -> Quota:
        """The quota of everyone; raises ConfigurationError where the rule is tiered."""
        if isinstance(self._quota, Quota):
            return self._quota
        raise ConfigurationError(f"Rule {self.name!r} has no quota for everyone: a function says it for each call.")

    async def terms(self, call: Call, admission: Admission) -> tuple[Quota, int] | None:
        """Return the quota and the cost of a call, or None where it is exempt.

        Raises:
            ConfigurationError: a function's answer is no quota, or no cost.
        """
        quota = self._quota
        if not isinstance(quota, Quota):
            told = quota(call, admission)
            if told is not None and not isinstance(told, Quota | str) and isawaitable(told):
                told = await told
            if told is None:
                return None
            quota = self._tier(told)
        cost = self._cost
        if callable(cost):
            units = cost(call, admission)
            if not isinstance(units, int) and isawaitable(units):
                units = await units
            cost = _check_cost(f"What the cost function of rule {self.name!r} answers", units)
        return quota, cost

    def _tier(self, told: Any) -> Quota:
        quota = _read(told) if isinstance(told, str) else told
        if not isinstance(quota, Quota):
            raise ConfigurationError(
                f"The quota function of rule {self.name!r} answers a Quota, its text or None, not a {_kind(told)}."
            )
        if quota.algorithm == "concurrency":
            raise ConfigurationError(
                f"The quota function of rule {self.name!r} can't answer a concurrency limit: "
                "write a rule for each tier, whose key is None for the others."
            )
        return quota

    def _derived_name(self) -> str:
        quota = self._quota
        said = quota.name if isinstance(quota, Quota) else getattr(quota, "__name__", "<lambda>")
        if said == "<lambda>":
            raise ConfigurationError("A rule whose quota is said by a function without a name needs a name=.")
        return _UNFIT.sub("_", " ".join((said, *sorted(self.operations or ()))))[:128]


@lru_cache(_TEXTS)
def _read(text: str) -> Quota:
    quotas = Quota.parse(text)
    if len(quotas) != 1:
        raise ConfigurationError(f"A rule has one quota; {text!r} is {len(quotas)}: give the policy a rule for each.")
    return quotas[0]


def _check_cost(whose: str, cost: object) -> int:
    if isinstance(cost, bool) or not isinstance(cost, int):
        raise ConfigurationError(f"{whose} must be a whole number of units, not a {_kind(cost)}.")
    if cost < 0:
        raise ConfigurationError(f"{whose} must be at least 0, not {cost}.")
    return cost


def _kind(value: object) -> str:
    return type(value).__name__
