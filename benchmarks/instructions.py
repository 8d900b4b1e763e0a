"""How many machine instructions a request takes: a count that repeats, whatever else the machine is doing.

Run it with ``.venv/bin/python -m benchmarks.instructions``, two minutes or so, before a change and after it; ``--only``
takes some rows. It needs valgrind. Each row is the difference between a run of some requests and one of twice as many,
so that starting up falls out. Instructions are not time: caches are not in it, so no budget is held against them.
"""

import argparse
import asyncio
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from starlette.types import ASGIApp

from benchmarks.http import ALL, BARE, CONTEXT, MANY, NEW, ours, raw
from benchmarks.peers import fastapi_app
from benchmarks.profiles import over_raw
from benchmarks.report import Row, Table, as_text
from benchmarks.rounds import Exchange, extra_of, scope_of

REQUESTS = 400
RAW = "raw ASGI application"
OVER_RAW: dict[str, Callable[[], ASGIApp]] = {RAW: lambda: raw} | {
    f"{RAW} + {row}": lambda row=row: over_raw(row)  # type: ignore[misc] # mypy can't infer a lambda's default
    for row in (CONTEXT, ALL)
}
OVER_ROUTE = {f"{BARE} + {row}, in memory": row for row in (ALL, NEW)}
NAMES = (*OVER_RAW, BARE, *OVER_ROUTE)


async def serve(name: str, requests: int) -> None:
    """Serve so many requests, in the process that is counted."""
    async with AsyncExitStack() as stack:
        if name in OVER_RAW:
            app = OVER_RAW[name]()
        elif name in OVER_ROUTE:
            app = await stack.enter_async_context(ours(OVER_ROUTE[name])(MANY, None))
        else:
            app = fastapi_app()
        kind = "new" if OVER_ROUTE.get(name) == NEW else ""
        for number in range(requests):
            exchange = Exchange()
            await app(scope_of(number, extra_of(kind, number)), exchange.receive, exchange.send)


async def count(name: str, requests: int, turns: asyncio.Semaphore) -> int:
    """Return the instructions of a process that serves so many requests."""
    counted = [sys.executable, "-m", "benchmarks.instructions", "--serve", name, str(requests)]
    async with turns:
        process = await asyncio.create_subprocess_exec(
            "valgrind",
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            *counted,
            stderr=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        _, said = await process.communicate()
    found = re.search(rb"Collected : (\d+)", said)
    if process.returncode or found is None:
        raise RuntimeError(f"valgrind ended with {process.returncode}: {said[-400:].decode(errors='replace')}")
    return int(found[1])


async def main(names: list[str]) -> None:
    """Count and print."""
    turns = asyncio.Semaphore(os.cpu_count() or 1)
    counts = await asyncio.gather(*(count(name, times * REQUESTS, turns) for name in names for times in (1, 2)))
    rows = []
    for name, once, twice in zip(names, counts[::2], counts[1::2], strict=True):
        rows.append(Row(name, ((twice - once) / REQUESTS,)))
    print(as_text(Table("Instructions of one request", ("instructions",), tuple(rows))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="ROW,...", help=f"of: {'; '.join(NAMES)}, by how they end", default="")
    parser.add_argument("--serve", nargs=2, metavar=("ROW", "REQUESTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve[0], int(arguments.serve[1])))
        sys.exit()
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not on PATH; Debian and its like have it as the package valgrind.")
    asyncio.run(main([name for name in NAMES if name.endswith(tuple(arguments.only.split(",")))]))
