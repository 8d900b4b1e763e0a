"""Floor 2: what a call asks of the rules that concern it."""

from collections.abc import Iterable
from inspect import isawaitable

from resilience.admission import Admission
from resilience.call import Call
from resilience.policies.rule import Rule
from resilience.stores.base import Want

_made = tuple.__new__  # half the time of calling a named tuple's class, once for each rule of each call


def plain_wants(rules: Iterable[Rule], call: Call, admission: Admission, token: str) -> list[Want]:
    """Return what ``wants_of`` does, at once: for rules that are all ``plain``."""
    wants = []
    for rule in rules:
        terms = rule.fixed
        if terms is not None and (rule.operations is None or call.operation in rule.operations):
            wants.append(_made(Want, (rule.name, rule.key(call, admission), terms[0], terms[1], token)))
    return wants


async def wants_of(rules: Iterable[Rule], call: Call, admission: Admission, token: str) -> list[Want]:
    """Return a want for each rule, in order; none where the rule is for other operations, or the call is exempt.

    Args:
        token: the call's own, for permits.

    Raises:
        ConfigurationError: a function of a rule answers what is out of range. What it raises itself passes through.
    """
    wants = []
    for rule in rules:
        if rule.operations is not None and call.operation not in rule.operations:
            continue
        subject = rule.key(call, admission)
        if not isinstance(subject, str):
            if isawaitable(subject):
                subject = await subject
            if subject is None:
                continue
        terms = rule.fixed or await rule.terms(call, admission)
        if terms is not None:
            wants.append(_made(Want, (rule.name, subject, terms[0], terms[1], token)))
    return wants
