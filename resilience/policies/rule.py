"""Floor 2: one rate limit, told whole: how much, for whom, at what cost."""

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Literal

from resilience.admission import Admission
from resilience.call import Call
from resilience.caller import by_address
from resilience.decisions.quota import Quota
from resilience.errors import ConfigurationError

Key = Callable[[Call, Admission], Awaitable[str | None] | str | None]
"""Names whom a call is counted for; None exempts it. A name should say its kind (``"tenant:7"``): rules that
count for the same name share nothing, but people read it."""

OnOutage = Literal["open", "closed", "local"]
"""What callers see while the store is gone: let in, refused, or counted in this process's memory."""

# What fits a structured-field string without escapes. Source: RFC 8941, 3.3.3.
_NAME = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,128}")
_UNFIT = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")


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

    Args:
        quota: ``Quota(100, per=60)``, or its text, ``"100/minute"``.
        key: whom it counts for: ``caller`` (the default), ``address``, ``everyone``, or a function of
            yours, sync or async.
        operations: the operations that draw on it, all on the same count; every one where None.
        cost: units that one call takes, at least 0.
        on_outage: ``open``, ``closed`` or ``local``; the policy's where None.
        name: what the rule is called in replies and in the store, unique in its policy. The default is the
            quota's text, and the operations where there are any.

    Raises:
        ConfigurationError: a value is out of range.
    """

    __slots__ = ("cost", "key", "name", "on_outage", "operations", "quota")

    def __init__(
        self,
        quota: Quota | str,
        *,
        key: Key = caller,
        operations: Iterable[str] | None = None,
        cost: int = 1,
        on_outage: OnOutage | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(quota, str):
            quotas = Quota.parse(quota)
            if len(quotas) != 1:
                raise ConfigurationError(
                    f"A rule has one quota; {quota!r} is {len(quotas)}: give the policy a rule for each."
                )
            quota = quotas[0]
        if cost < 0:
            raise ConfigurationError(f"A rule's cost must be at least 0, not {cost}.")
        if quota.algorithm == "concurrency" and cost != 1:
            raise ConfigurationError(f"A call takes one permit of a concurrency limit, not {cost}.")
        self.quota = quota
        self.key = key
        self.operations = None if operations is None else frozenset(operations)
        self.cost = cost
        self.on_outage = on_outage
        derived = " ".join((quota.name, *sorted(self.operations or ())))
        self.name = name or _UNFIT.sub("_", derived)[:128]
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} is not a rule's name: use 1 to 128 printable ASCII characters, no quote or backslash."
            )
