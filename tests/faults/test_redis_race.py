"""Several processes at one limit, or one key."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faults.redis_racer import RACE, SHORT_LIMIT, SHORT_RUN, SHORT_WINDOW
from tests.support.redis_servers import RedisServer

ROOT = Path(__file__).parents[2]


def race(what: str, url: str, processes: int) -> list[Any]:
    """Let processes loose at the same time; return what each of them saw."""
    with ExitStack() as stack:
        racers = []
        for n in range(processes):
            command = [sys.executable, "-m", "tests.faults.redis_racer", what, url, str(n)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            racer = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))  # type: ignore[call-overload]
            stack.callback(racer.kill)
            racers.append(racer)
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        return [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]


async def test_eight_processes_admit_exactly_the_limit(server: RedisServer) -> None:
    admitted = race("limit", server.url, 8)
    assert sum(admitted) == RACE.quota.limit
    assert sum(count > 0 for count in admitted) > 1  # it was a race


async def test_eight_processes_run_an_idempotent_operation_once(server: RedisServer) -> None:
    seen = race("claim", server.url, 8)
    assert sum(ran for ran, _ in seen) == 1
    assert len({reply for _, reply in seen}) == 1


@pytest.mark.slow
async def test_no_window_of_time_ever_holds_more_than_the_limit(server: RedisServer) -> None:
    admitted = sorted(tuple(span) for seen in race("window", server.url, 4) for span in seen)
    # An admission happened somewhere between two instants: those that surely fell into one window are counted, less
    # a thousandth of it for what the clocks of the server and of its clients may differ in speed.
    for start, _ in admitted:
        stop = start + SHORT_WINDOW * 0.999
        surely = sum(start <= before and after < stop for before, after in admitted)
        assert surely <= SHORT_LIMIT
    assert len(admitted) >= SHORT_LIMIT * (SHORT_RUN / SHORT_WINDOW - 2)
