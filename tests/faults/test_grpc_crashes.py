"""A context that is used after its RPC kills a bare server by SIGSEGV; behind our door it tells what it knew.

The server is a process of its own, and all that ends its RPC is what any client can do: leave, or not wait for long.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc
import pytest

from tests.faults.grpc_crasher import AGAIN, SITES
from tests.integration.grpc_world import GO, Pair, ask, start

ROOT = Path(__file__).parents[2]
BOUND = 20.0  # Seconds that any one wait may take.
KEY: Pair = ("idempotency-key", "key-1")


Ended = tuple[int, list[str], str]
"""The exit code, the output and the errors."""


async def provoke(site: str, guard: str) -> Ended:
    """Serve ``site`` and call it as a client that leaves; return how the server ended."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "faulthandler", "-m", "tests.faults.grpc_crasher", site, guard),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(BOUND):
            port = int(await process.stdout.readline())
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await call(channel, site)
                seen = await process.stdout.readline()
                if seen:  # it lives
                    assert (await ask(channel, AGAIN)).replies == [b"done"]
            out, err = await process.communicate(b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, [seen.decode().strip(), *out.decode().split()], err.decode()


async def call(channel: grpc.aio.Channel, site: str) -> None:
    """Call the handler, and leave it as the site wants it."""
    match site:
        case "background_task":
            assert (await ask(channel)).replies == [b"done"]
        case "generator_in_a_write":
            stream = start(channel, GO, "unary_stream")
            assert await stream.read() == b"x" * 100_000
            stream.cancel()
        case _:
            key = [KEY] if site == "keyed_work" else []
            await ask(channel, GO, "unary_unary", *key, deadline=0.3)


@pytest.fixture(scope="module")
def guarded() -> dict[str, Ended]:
    """Provoke all sites at the same time, each in a process of its own."""

    async def all_of_them() -> list[Ended]:
        return await asyncio.gather(*(provoke(site, "guarded") for site in SITES))

    return dict(zip(SITES, asyncio.run(all_of_them()), strict=True))


@pytest.mark.parametrize("site", SITES)
def test_no_client_can_end_a_guarded_server_by_leaving(guarded: dict[str, Ended], site: str) -> None:
    code, out, err = guarded[site]
    assert (code, out) == (0, ["ipv4:127.0.0.1", "True"]), err
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize("site", sorted(SITES.keys() - {"keyed_work"}))
async def test_the_trap_is_still_there_without_the_guard(site: str) -> None:
    """Tells whether the guard is still needed: skips where the installed grpcio survives."""
    code, _, err = await provoke(site, "bare")
    if code == 0:
        pytest.skip("This grpcio survives without us.")
    assert code == -signal.SIGSEGV, err
