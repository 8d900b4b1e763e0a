"""Drives an ASGI application: with a client in this process, message by message, or behind a real server.

Every wait in here ends: what does not answer within ``BOUND`` seconds fails its test.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import httpx
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BOUND = 5.0
HOST = "127.0.0.1"

T = TypeVar("T")


async def within(awaitable: Awaitable[T]) -> T:
    """Await, but not for ever."""
    return await asyncio.wait_for(awaitable, BOUND)


class _BoundedTransport(httpx.ASGITransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with asyncio.timeout(BOUND):
            return await super().handle_async_request(request)


def connect(
    app: ASGIApp, *, address: str = HOST, root_path: str = "", headers: dict[str, str] | None = None
) -> httpx.AsyncClient:
    """Return a client of ``app`` in this process; its requests come from ``address``."""
    transport = _BoundedTransport(
        app=cast("Any", app), raise_app_exceptions=False, root_path=root_path, client=(address, 50_000)
    )
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


def http_scope(
    method: str = "GET",
    path: str = "/",
    *headers: tuple[bytes, bytes],
    query: bytes = b"",
    extensions: Iterable[str] = (),
) -> Scope:
    """Return the scope of a request as a server would make it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": list(headers),
        "client": (HOST, 50_000),
        "server": (HOST, 80),
        "extensions": {name: {} for name in extensions},
    }


def websocket_scope(path: str, *headers: tuple[bytes, bytes], extensions: Iterable[str] = ()) -> Scope:
    """Return the scope of a handshake as a server would make it."""
    scope = http_scope("GET", path, *headers, extensions=extensions)
    del scope["method"]
    return {**scope, "type": "websocket", "scheme": "ws", "subprotocols": []}


def upload(*chunks: bytes) -> list[Message]:
    """Return the messages of a whole body that arrives in ``chunks``."""
    pieces = chunks or (b"",)
    last = len(pieces) - 1
    return [{"type": "http.request", "body": piece, "more_body": at < last} for at, piece in enumerate(pieces)]


class Wire:
    """The server's side of one exchange: gives the application ``messages``, and keeps what it sends.

    After the last message ``receive`` waits, as a server does while its client does.

    Args:
        messages: what the client sends.
        on_send: told of each message before it counts as sent.
    """

    def __init__(
        self, messages: Iterable[Message] = (), *, on_send: Callable[[Message], Awaitable[None]] | None = None
    ) -> None:
        self.waiting = list(messages)
        self.sent: list[Message] = []
        self._on_send = on_send

    async def receive(self) -> Message:
        """Give the next message."""
        if self.waiting:
            return self.waiting.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        """Take a message."""
        if self._on_send is not None:
            await self._on_send(message)
        self.sent.append(message)

    async def run(self, app: ASGIApp, scope: Scope) -> "Wire":
        """Have ``app`` serve ``scope``."""
        async with asyncio.timeout(BOUND):
            await app(scope, self.receive, self.send)
        return self

    def _start(self) -> Message:
        (start,) = [message for message in self.sent if message["type"].endswith("response.start")]
        return start

    @property
    def status(self) -> int:
        """The status that was sent."""
        status: int = self._start()["status"]
        return status

    @property
    def headers(self) -> httpx.Headers:
        """The headers that were sent."""
        return httpx.Headers(list(self._start()["headers"]))

    @property
    def body(self) -> bytes:
        """The body that was sent."""
        return b"".join(message.get("body", b"") for message in self.sent if message["type"].endswith("response.body"))


def is_last(message: Message) -> bool:
    """Tell whether a message ends a response."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


class Ends:
    """Passes everything on to ``app``, and tells when a request's call has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve."""
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.ended.put_nowait(scope["path"])

    async def next(self) -> str:
        """Wait for the end of a request; return its path."""
        return await within(self.ended.get())


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(app: ASGIApp, **options: Any) -> _Server:
    """Return a real server that leaves the process's signals and logs alone."""
    return _Server(uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5, **options))


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, **options: Any) -> AsyncIterator[int]:
    """Serve ``app`` on a free port, which is yielded, until the block ends."""
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        port: int = bound.getsockname()[1]
        server = server_of(app, **options)
        task = asyncio.create_task(server.serve([bound]))
        try:
            await within(server.serving.wait())
            yield port
        finally:
            server.should_exit = True
            await within(task)


def dial(port: int, **options: Any) -> httpx.AsyncClient:
    """Return a client of the server on ``port``."""
    return httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=BOUND, **options)


async def read_response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read one response that has a content-length: its head, and its body."""
    head = await within(reader.readuntil(b"\r\n\r\n"))
    (length,) = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head, await within(reader.readexactly(int(length)))
