"""Floor 4: how much leaves in trailers. From 8 KiB on grpc drops calls at random, and the handler's own come on top."""

from collections.abc import Iterable, Sequence

from resilience import wire
from resilience.admission import Admission
from resilience.decisions.quota import Quota, Usage

MOST_BYTES = 1024
"""Of all trailers that are ours, with their names."""

_LISTS = (wire.RATELIMIT_POLICY, wire.RATELIMIT)
_NAMES = sum(map(len, _LISTS))


def fit_limits(admission: Admission, taken: int = 0) -> None:
    """Let ``ratelimit`` and ``ratelimit-policy`` tell of as many rules as there is room for.

    Those that are told are the ones that denied, then the ones nearest to their end, in the order they were asked in.
    What they tell of one rule has room at all times, so a single one is not looked at.

    Args:
        admission: the call's; its metadata is changed where it is too much.
        taken: bytes that other trailers of ours need, 0 or more.
    """
    limits = admission.limits
    if len(limits) < 2 or taken + size(admission.metadata) <= MOST_BYTES:
        return
    others = [pair for pair in admission.metadata if pair[0] not in _LISTS]
    room = MOST_BYTES - taken - size(others) - _NAMES
    told: set[int] = set()
    for index in sorted(range(len(limits)), key=lambda index: limits[index][2].slack):
        room -= sum(map(len, _fields([limits[index]]))) + 4  # and a comma with its space in each list
        if room < 0:
            break
        told.add(index)
    fields = _fields([rule for index, rule in enumerate(limits) if index in told])
    admission.metadata[:] = (*others, *zip(_LISTS, fields, strict=True)) if told else others


def size(trailers: Iterable[Sequence[str]]) -> int:
    """Return how many bytes text trailers take, names and values."""
    return sum(len(name) + len(value) for name, value in trailers)


def encoded(size: int) -> int:
    """Return how many bytes a binary trailer's value of ``size`` bytes takes.

    Source: "gRPC over HTTP2", Custom-Metadata: it travels as base64.
    """
    return -(-size // 3) * 4


def _fields(limits: Sequence[tuple[str, Quota, Usage]]) -> tuple[str, str]:
    policy = wire.policy_field([(name, quota) for name, quota, _ in limits])
    return policy, wire.usage_field([(name, usage) for name, _, usage in limits])
