"""Why a budget was missed: what people have found out, told with the figures of the run. Measures nothing.

A reason holds for as long as the figures that it names bear it out: whoever changes what is measured, reads it again.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.budgets import PROMISES, Promise

Figures = Mapping[str, float]

CONTEXT_RAW = "Profile: context alone over a raw ASGI application"
ALL_RAW = "Profile: all four policies over a raw ASGI application"
ALL_ROUTE = "Profile: all four policies over a FastAPI route, in memory"
LIMIT_64 = "Profile: a limit over a FastAPI route, Redis, 64 at once"
NEW_64 = "Profile: a new key over a FastAPI route, Redis, 64 at once"


PEERS = ("slowapi", "throttled-py", "fastapi-redis-sdk", "fastapi-limiter")
"""Those that a budget names."""


class Reason(NamedTuple):
    """Why a promise may be missed.

    Args:
        profile: the title of the table that shows where the time goes.
        text: says it, from the figures of a run; raises KeyError where one of them was not measured.
    """

    profile: str
    text: Callable[[Figures], str]


class Missed(NamedTuple):
    """A promise that was missed: what was found, and why as far as is known."""

    promise: Promise
    why: str
    profile: str = ""


def _all_raw(found: Figures) -> str:
    return f"""
        A wrapped reply alone is {found["raw.wrapped"]:.1f} µs, ids that nobody checks are {found["raw.ids"]:.1f}.
        Of ours the context is {found["http.context"]:.1f}; the rest is the limit: its count, its verdict, and its
        header fields. No single part stands out in the profile.
    """


def _share(found: Figures) -> str:
    route, all_four, plain = found["route.bare"], found["route.all"], found["http.all"]
    room, slower = route / 0.93 - route, all_four / plain
    return f"""
        The route takes {route:.1f} µs, so that a share of 0.93 leaves {room:.1f} µs for all four policies. In the
        same place a middleware that only wraps the reply takes {found["route.wrapped"]:.1f}, and the shortest that
        handles ids, unchecked, {found["route.ids"]:.1f}. Ours take {plain:.1f} over a raw application and
        {all_four:.1f} here: the same code takes {slower:.1f} times as long in between FastAPI's, which leaves no
        cache warm for it. The context alone is {found["route.context"]:.1f} of that. What is written in Python does
        not fit.
    """


def _context(found: Figures) -> str:
    rest = found["http.context"] - found["raw.ids"]
    return f"""
        A wrapped reply alone is {found["raw.wrapped"]:.1f} µs, ids that nobody checks are {found["raw.ids"]:.1f}.
        The other {rest:.1f} µs are what those leave out: ids that are checked before they are echoed, ids on
        errors, a deadline, a caller whom authentication further in may name, a refusal that a decorator inside of
        the handler may make. For these there are a call, an admission and a second stage, each of which has its
        line in the profile.
    """


def _crowd(found: Figures) -> str:
    free = ", ".join(f"{found[f'free.{peer}']:.1f} times {peer}'s" for peer in PEERS if f"free.{peer}" in found)
    return f"""
        The bare route is {found["crowd.bare"]:.1f} µs of every request, ours and theirs: a guard that costs nothing
        would serve {free}. Ours adds {found["crowd.limit"]:.1f} µs. In the profile asyncio and FastAPI have a part
        in it, which cost more when 64 requests take turns than when each runs through; the rest is spread over the
        stages of one decision. Merged commands and one write for each turn of the loop are in it already.
    """


def _new_key(found: Figures) -> str:
    return f"""
        Two writes through our own link, and nothing else, are {found["new.link"]:.1f} µs, and through redis-py
        {found["new.redis-py"]:.1f}. In memory, where nothing waits, a new key adds {found["new.memory"]:.1f}: the
        body is read ahead and made canonical, the caller and the key are hashed, the reply is packed. Over Redis
        all 64 wait in the middle of FastAPI's stack until their replies are stored, which is promised to be before
        the last byte leaves. In the profile that is the garbage collector, which walks them, and the loop, which
        takes each up twice.
    """


REASONS: Mapping[str, Reason] = {
    "http.all": Reason(ALL_RAW, _all_raw),
    "http.share": Reason(ALL_ROUTE, _share),
    "http.context": Reason(CONTEXT_RAW, _context),
    "http.slowapi": Reason(LIMIT_64, _crowd),
    "idempotency.new": Reason(NEW_64, _new_key),
}
"""By the key of a promise's first part."""


def missed(found: dict[str, float]) -> list[Missed]:
    """Return the promises that were missed, in the design's order."""
    return [_explained(promise, found) for promise in PROMISES if promise.verdict(found) == "MISSED"]


def _explained(promise: Promise, found: Figures) -> Missed:
    reason = REASONS.get(promise.parts[0].key)
    if reason is None:
        return Missed(promise, "No reason is known.")
    try:
        return Missed(promise, " ".join(reason.text(found).split()), reason.profile)
    except KeyError as error:
        return Missed(promise, f"What it would be explained with, {error}, was not measured.", reason.profile)
