"""Counts side effects outside of the processes that have them, and says when a handler may go on.

A handler tells the ledger of each step and waits for its word: what was told is kept, whatever becomes of the process,
and a test that keeps the word back knows exactly where the handler stands.
"""

import asyncio
import json
from time import monotonic
from typing import Any, NamedTuple, Self

_PATIENCE = 20.0  # Seconds that a test waits for a step at most.


class Note(NamedTuple):
    """One step of one handler.

    Args:
        event: ``arrived`` (at the door), ``before`` (claimed), ``run`` (the side effect), ``end``, ``background``,
            ``after`` (stored, and nothing sent), ``lag`` (of the whole process).
        key: the caller and the idempotency key.
        process: which one.
        run: unique to one run of a handler.
        epoch: as the handler was told it.
        op: the client's name for its call.
        at: seconds on the machine's monotonic clock.
        seconds: how long a lag was.
    """

    event: str
    key: str
    process: str
    run: str
    epoch: int
    op: str
    at: float
    seconds: float


class Ledger:
    """Where the handlers of all processes tell what they do. ``async with`` opens and closes it."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.port = 0
        self._held: dict[Note, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def runs(self, key: str) -> list[Note]:
        """Return the side effects that ``key`` had."""
        return [note for note in self.notes if note.key == key and note.event == "run"]

    def lags(self) -> list[Note]:
        """Return when a process could not run for a while."""
        return [note for note in self.notes if note.event == "lag"]

    async def seen(self, key: str, event: str = "run", count: int = 1) -> Note:
        """Wait for the ``count``-th such step, and return it."""
        async with asyncio.timeout(_PATIENCE):
            while True:
                changed = self._changed
                found = [note for note in self.notes if (note.key, note.event) == (key, event)]
                if len(found) >= count:
                    return found[count - 1]
                await changed.wait()

    def release(self, note: Note) -> None:
        """Let a handler go on that stands at ``note``."""
        self._held.pop(note).set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # As a task that is ours to end: one of the server's own says so aloud when it is cut.
        task = asyncio.create_task(self._hear(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            told = json.loads(await reader.readline())
            held = told.pop("held")
            note = Note(**told, at=monotonic())
            go_on = asyncio.Event()
            if held:
                self._held[note] = go_on
            else:
                go_on.set()
            self.notes.append(note)
            self._changed.set()
            self._changed = asyncio.Event()
            await go_on.wait()
            writer.write(b"\n")
            await writer.drain()
        except (OSError, ValueError):
            pass  # the process died at this very step
        finally:
            writer.close()


class Pen:
    """Writes into the ledger from a process.

    Args:
        port: the ledger's.
        process: the name of this process.
    """

    def __init__(self, port: int, process: str) -> None:
        self._port = port
        self._process = process

    async def tell(
        self,
        event: str,
        key: str = "",
        *,
        run: str = "",
        epoch: int = 0,
        op: str = "",
        held: bool = False,
        seconds: float = 0.0,
    ) -> None:
        """Tell of a step, and wait until the ledger has it and, where ``held``, until the test lets go."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            told: dict[str, Any] = {"event": event, "key": key, "process": self._process, "run": run}
            told |= {"epoch": epoch, "op": op, "held": held, "seconds": seconds}
            writer.write(json.dumps(told).encode() + b"\n")
            await reader.readline()
        finally:
            writer.close()
