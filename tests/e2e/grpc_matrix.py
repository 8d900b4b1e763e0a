"""The cells of the matrix, and a client that plays them against a server in another process."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.grpc_matrix_styles import EARLY, SENT, SLOW_STARTERS, STYLES, path
from tests.integration.grpc_world import Told, start, told

ROOT = Path(__file__).parents[2]
BOUND = 20.0  # Seconds that any one cell may take; then it hangs.
DEADLINE = 1.0

StatusCode = grpc.StatusCode

ENDS: dict[str, tuple[str, StatusCode, str | None, list[bytes]]] = {
    # what happens: what the handler does, and the code, the text and the replies that its client gets
    "ok": ("oks", StatusCode.OK, "", [b"done"]),
    "abort": ("aborts", StatusCode.FAILED_PRECONDITION, "Not yet", []),
    "raise": ("raises", StatusCode.INTERNAL, "Internal error", []),
    "set_code": ("sets_code", StatusCode.NOT_FOUND, "Nothing there", [b""]),
    "leaked_cancel": ("leaks", StatusCode.INTERNAL, "Internal error", []),
    "slow": ("waits", StatusCode.OK, "", [b"done"]),
    "client_cancel": ("waits", StatusCode.CANCELLED, None, []),
    "client_deadline": ("waits", StatusCode.DEADLINE_EXCEEDED, None, []),
}
LEAVES = ("client_cancel", "client_deadline")
ACCIDENTS = ("raise", "leaked_cancel")


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to write a handler, and one thing that happens to its call.

    Args:
        style, end: keys of ``STYLES`` and ``ENDS``.
        early: whether it happens after a first reply.
        keyed: whether the call has an idempotency key.
    """

    style: str
    end: str
    early: bool = False
    keyed: bool = False

    def __str__(self) -> str:
        return f"{self.style}.{self.end}{'.early' * self.early}{'.keyed' * self.keyed}"

    @property
    def kind(self) -> str:
        return STYLES[self.style].kind

    @property
    def path(self) -> str:
        return path(self.style, ENDS[self.end][0], early=self.early)

    def expected(self) -> tuple[StatusCode, str | None, list[bytes]]:
        """Return the code, the text (None where it is the client's own) and the replies that the client gets."""
        _, code, text, replies = ENDS[self.end]
        many = self.kind.endswith("_stream")
        return code, text, [EARLY] * self.early + (replies if many or code is StatusCode.OK else [])


CELLS = [
    *(Cell(style, end) for style in STYLES for end in ENDS),
    *(
        Cell(name, end, early=True)
        for name, style in STYLES.items()
        for end in ENDS
        if style.kind.endswith("_stream") and name not in SLOW_STARTERS
    ),
    *(
        Cell(name, end, keyed=True)
        for name, style in STYLES.items()
        for end in ENDS
        if style.kind == "unary_unary"
    ),
]  # fmt: skip


@dataclass
class Seen:
    """What a client saw of one cell: its end, that of a retry with the same key, and how often the handler ran."""

    end: Told
    again: Told | None = None
    runs: int = 0


@dataclass
class Ran:
    """What became of a server and of all that was asked of it."""

    seen: dict[Cell, Seen | BaseException] = field(default_factory=dict)
    serves_on: bool = False
    exit_code: int | None = None
    report: dict[str, Any] = field(default_factory=dict)
    stderr: list[str] = field(default_factory=list)

    def log(self) -> list[list[Any]]:
        """Return the records of the server's log: level, logger, message, correlation id, exception."""
        return [json.loads(line) for line in self.stderr if line.startswith("[")]


@contextlib.asynccontextmanager
async def served(loop: str, ran: Ran, folder: Path) -> AsyncIterator[grpc.aio.Channel]:
    """Run a server on that event loop, and tell ``ran`` how it ended."""
    command = [sys.executable, "-X", "faulthandler", "-W", "default", "-m", "tests.e2e.grpc_matrix_server", loop]
    log, pipe = folder / "stderr", asyncio.subprocess.PIPE
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=pipe, stdout=pipe, stderr=errors
        )
    assert process.stdout is not None
    try:
        port = (await asyncio.wait_for(process.stdout.readline(), BOUND)).decode().strip()
        assert port, log.read_text()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        out, _ = await asyncio.wait_for(process.communicate(b""), BOUND)
        ran.report = json.loads(out or b"{}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        ran.exit_code = process.returncode
        ran.stderr = log.read_text().splitlines()


async def play(loop: str, cells: Iterable[Cell], folder: Path) -> Ran:
    """Play all cells against one server, each beside the others."""
    ran = Ran()
    async with served(loop, ran, folder) as channel:
        cells = list(cells)
        # Deadlines run apart, or the bustle of all the others could use them up before a handler runs.
        for late in (False, True):
            some = [cell for cell in cells if (cell.end == "client_deadline") is late]
            ends = await asyncio.gather(*(bounded(channel, cell) for cell in some), return_exceptions=True)
            ran.seen.update(zip(some, ends, strict=True))
        ran.serves_on = await serves(channel)
    return ran


async def serves(channel: grpc.aio.Channel) -> bool:
    """Tell whether each style of handler still answers, and health with them."""
    again = [Cell(style, "ok") for style in STYLES]
    ends = await asyncio.gather(*(bounded(channel, cell) for cell in again))
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=BOUND)
    return {seen.end.code for seen in ends} == {StatusCode.OK} and health.status == 1


async def bounded(channel: grpc.aio.Channel, cell: Cell) -> Seen:
    async with asyncio.timeout(BOUND):
        return await _play(channel, cell)


async def _play(channel: grpc.aio.Channel, cell: Cell) -> Seen:
    async def look(what: str) -> int:
        stub: Any = channel.unary_unary("/matrix.Control/Look")
        return int(await stub(str(cell).encode(), metadata=(("x-look", what),), timeout=BOUND))

    call, replies = begin(channel, cell), [EARLY] if cell.early else []
    if cell.kind.startswith("stream_"):
        for message in SENT:
            await call.write(message)
        await call.done_writing()
    if cell.early:
        assert await call.read() == EARLY
    if ENDS[cell.end][0] == "waits":
        await look("entered")
        if cell.end == "slow":
            await look("release")
        if cell.end == "client_cancel":
            call.cancel()
    seen = Seen(await finish(call, cell, replies))
    if cell.end in LEAVES:
        await look("release" if cell.keyed else "cut")
        await look("settled")
    if cell.keyed and cell.end not in ACCIDENTS:
        seen.again = await finish(begin(channel, cell), cell, [])
    seen.runs = await look("runs")
    return seen


def begin(channel: grpc.aio.Channel, cell: Cell) -> Any:
    metadata = [("x-correlation-id", str(cell))] + [("idempotency-key", f"key-{cell}")] * cell.keyed
    late = cell.end == "client_deadline"
    return start(channel, cell.path, cell.kind, *metadata, send=SENT, deadline=DEADLINE if late else BOUND)


async def finish(call: Any, cell: Cell, replies: list[bytes]) -> Told:
    """Take the rest of the replies."""
    try:
        if cell.kind.endswith("_stream"):
            while (reply := await call.read()) is not grpc.aio.EOF:
                replies.append(reply)
        else:
            replies.append(await call)
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        if not call.done():
            raise
    return await told(call, replies)


async def storm(loop: str, folder: Path) -> Ran:
    """Leave calls of every style at every point of their lives; nobody listens to how they end."""
    ran = Ran()
    async with served(loop, ran, folder) as channel, asyncio.timeout(60):
        for ticks in (*range(12), *(2**power for power in range(4, 13))):
            await asyncio.gather(
                *(
                    leave(channel, Cell(style, end), ticks)
                    for style in STYLES
                    for end in ("ok", "abort", "raise", "client_cancel")
                )
            )
        ran.serves_on = await serves(channel)
    return ran


async def leave(channel: grpc.aio.Channel, cell: Cell, ticks: int) -> None:
    """Cancel a call after so many turns of the client's loop."""
    call = begin(channel, cell)
    for turn in range(ticks):
        if turn < len(SENT) and cell.kind.startswith("stream_") and not call.done():
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(SENT[turn])
        await asyncio.sleep(0)
    call.cancel()
    await call.code()


def run_matrix(loop: str, folder: Path) -> Ran:
    return asyncio.run(play(loop, CELLS, folder))


def run_storm(loop: str, folder: Path) -> Ran:
    return asyncio.run(storm(loop, folder))
