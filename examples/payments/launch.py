"""Start the demo as a process of its own, on free ports, for the tour and the end-to-end tests."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_ADDRESSES = re.compile(r"Payments on (?P<http>http://\S+) .* grpc://(?P<grpc>\S+)\. ")
_START = 30.0  # Seconds that a start may take.
_STOP = 20.0  # Seconds that a stop may take, the grace for running work included.


@dataclass(frozen=True, slots=True)
class Launched:
    """A running demo.

    Args:
        http: the HTTP door's base URL.
        grpc: the gRPC door's host and port.
        process: the process; it may be stopped early.
        log: the file that its log goes to, one JSON object a line.
    """

    http: str
    grpc: str
    process: asyncio.subprocess.Process
    log: Path


@contextlib.asynccontextmanager
async def launch(log: Path, **environment: str) -> AsyncIterator[Launched]:
    """Start the demo with ``environment`` on top of this process's own; stop it at the end of the block.

    Raises:
        RuntimeError: it did not start; the message names its log.
    """
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "examples.payments",
            cwd=_ROOT,
            env={**os.environ, "HTTP_PORT": "0", "GRPC_PORT": "0", "HEALTH_DRAIN_SECONDS": "0", **environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        match = await asyncio.wait_for(_addresses(process), _START)
        if match is None:
            raise RuntimeError(f"The demo did not start; its log is in {log}.")
        yield Launched(match["http"], match["grpc"], process, log)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), _STOP)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _addresses(process: asyncio.subprocess.Process) -> re.Match[str] | None:
    assert process.stdout is not None
    async for line in process.stdout:
        match = _ADDRESSES.search(line.decode())
        if match is not None:
            return match
    return None
