"""Requests to an ASGI application without a socket, and rounds of them in turns, so that noise hits all alike."""

import asyncio
import gc
import sys
from collections.abc import Mapping
from itertools import count
from time import perf_counter, process_time
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Scope

CALLERS = 1000
ADDRESSES = [(f"10.0.{number >> 8}.{number & 255}", 5000) for number in range(CALLERS)]
BODY = b'{"name":"Anvil","price":12.5,"tags":["iron","heavy"]}'
_HEADERS = [
    (b"host", b"bench"),
    (b"user-agent", b"bench/1"),
    (b"accept", b"*/*"),
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"x-correlation-id", b"0af7651916cd43dd8448eb211c80319c"),
]
_numbers = count()  # of the whole run: a new idempotency key must be new in every round


class Exchange:
    """One request and its answer: gives a small body once, then is silent like a client that waits."""

    __slots__ = ("_given", "headers", "status")

    def __init__(self) -> None:
        self._given = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    async def receive(self) -> Message:
        """Give the body; whoever asks again waits for a client that does not leave."""
        if self._given:
            await asyncio.Event().wait()
        self._given = True
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(self, message: Message) -> None:
        """Take the answer."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]


def scope_of(number: int, extra: tuple[tuple[bytes, bytes], ...] = ()) -> Scope:
    """Return request ``number``: callers come in turns, told apart by their addresses."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/things",
        "raw_path": b"/things",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [*_HEADERS, *extra],
        "client": ADDRESSES[number % CALLERS],
        "server": ("127.0.0.1", 80),
    }


class Candidate(NamedTuple):
    """What is measured.

    Args:
        app: the application.
        extra: what else each request carries: ``""``; ``"api key"``, one for each caller; ``"new"`` or ``"old"``, an
            idempotency key that nobody, or the same caller, sent before.
    """

    app: ASGIApp
    extra: str = ""


class Figure(NamedTuple):
    """What one request costs: microseconds of this process's CPU, and of the wall clock with all that runs at once."""

    cpu: float
    wall: float
    refused: int = 0
    """Answers other than 200, of all rounds: there should be none."""


def extra_of(kind: str, number: int) -> tuple[tuple[bytes, bytes], ...]:
    """Return what request ``number`` carries beside the usual headers. See ``Candidate``."""
    match kind:
        case "api key":
            return ((b"x-api-key", b"secret-%d" % (number % CALLERS)),)
        case "new":
            return ((b"idempotency-key", b"new-%d" % number),)
        case "old":
            return ((b"idempotency-key", b"old-%d" % (number % CALLERS)),)
        case _:
            return ()


async def one_round(candidate: Candidate, seconds: float, tasks: int) -> Figure:
    """Send requests for so many seconds, by so many tasks at once; return the mean cost of one."""
    app, kind = candidate
    done = refused = 0
    started, cpu = perf_counter(), process_time()
    ends = started + seconds

    async def work() -> None:
        nonlocal done, refused
        while perf_counter() < ends:
            number = next(_numbers)
            exchange = Exchange()
            await app(scope_of(number, extra_of(kind, number)), exchange.receive, exchange.send)
            done += 1
            refused += exchange.status != 200

    if tasks == 1:
        await work()
    else:
        await asyncio.gather(*(work() for _ in range(tasks)))
    return Figure((process_time() - cpu) / done * 1e6, (perf_counter() - started) / done * 1e6, refused)


async def measure(
    title: str, candidates: Mapping[str, Candidate], *, rounds: int, seconds: float, tasks: int = 1
) -> dict[str, Figure]:
    """Return the best decile of each candidate's rounds, after one round that doesn't count."""
    seen: dict[str, list[Figure]] = {name: [] for name in candidates}
    gc.collect()
    gc.freeze()  # what a library holds from its import on is nobody else's garbage to walk
    for turn in range(rounds + 1):
        print(f"\r  {title}: round {turn} of {rounds} ", end="", file=sys.stderr, flush=True)
        for name, candidate in candidates.items():
            figure = await one_round(candidate, seconds, tasks)
            if turn:
                seen[name].append(figure)
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    return {name: _best_decile(figures) for name, figures in seen.items()}


def _best_decile(figures: list[Figure]) -> Figure:
    at = len(figures) // 10
    cpu, wall = sorted(figure.cpu for figure in figures), sorted(figure.wall for figure in figures)
    return Figure(cpu[at], wall[at], sum(figure.refused for figure in figures))
