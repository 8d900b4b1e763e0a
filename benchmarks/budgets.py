"""What this library promises to cost, and whether what was found keeps it. The ten rows are the design's."""

from typing import Literal, NamedTuple

Verdict = Literal["met", "MISSED", "not measured"]


class Part(NamedTuple):
    """One figure of a promise.

    Args:
        key: what the figure is called among those that were found.
        most: whether the bound is the most that it may be; else the least.
        bound: in ``unit``.
        what: tells it from the promise's other parts.
    """

    key: str
    most: bool
    bound: float
    unit: str
    what: str = ""

    def verdict(self, found: dict[str, float]) -> Verdict:
        """Hold what was found to the bound."""
        figure = found.get(self.key)
        if figure is None:
            return "not measured"
        return "met" if (figure <= self.bound if self.most else figure >= self.bound) else "MISSED"


class Promise(NamedTuple):
    """One row of the design: met when all of its parts are."""

    what: str
    parts: tuple[Part, ...]

    def verdict(self, found: dict[str, float]) -> Verdict:
        """Hold what was found to every part; one that is missed weighs more than one that was not measured."""
        verdicts = {part.verdict(found) for part in self.parts}
        return "MISSED" if "MISSED" in verdicts else "not measured" if "not measured" in verdicts else "met"


def _at_most(what: str, key: str, bound: float) -> Promise:
    return Promise(what, (Part(key, True, bound, "µs"),))


def _at_least(what: str, key: str, bound: float, unit: str = "x") -> Promise:
    return Promise(what, (Part(key, False, bound, unit),))


PROMISES = (
    _at_most("all four policies, memory store, over a raw ASGI app", "http.all", 15),
    _at_least("the same, over a bare FastAPI route", "http.share", 0.93, "of its requests/s"),
    _at_most("context alone over a raw ASGI app", "http.context", 3.5),
    _at_most("all four policies, memory store, added to one gRPC call", "grpc.all", 15),
    _at_least("decisions/s over Redis, 64 at once, over redis-py's own PING", "store.callers", 4),
    _at_least("the same on one hot key", "store.hot", 12),
    Promise(
        "requests/s of FastAPI + Redis + headers, 64 at once",
        (
            Part("http.slowapi", False, 7, "x", "over slowapi's"),
            Part("http.throttled-py", False, 6, "x", "over throttled-py's"),
            Part("http.fastapi-redis-sdk", False, 3, "x", "over the Redis SDK's"),
            Part("http.fastapi-limiter", False, 2, "x", "over fastapi-limiter's"),
        ),
    ),
    Promise(
        "round trips to the store",
        (
            Part("trips.limit", True, 1, "", "one rule"),
            Part("trips.rules", True, 1, "", "three rules of one caller"),
            Part("trips.new", True, 2, "", "a new keyed request"),
            Part("trips.replay", True, 1, "", "a replay"),
        ),
    ),
    Promise(
        "client CPU of a keyed request over Redis, 64 at once, over a bare FastAPI route",
        (
            Part("idempotency.new", True, 100, "µs", "a new key"),
            Part("idempotency.replay", True, 60, "µs", "a replay"),
        ),
    ),
    Promise(
        "extra cost of an un-keyed request to a keyed route",
        (Part("http.unkeyed", True, 1, "µs", "HTTP"), Part("grpc.unkeyed", True, 1, "µs", "gRPC")),
    ),
)
