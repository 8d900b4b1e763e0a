"""What the tests of the gRPC door share: a real server with our interceptor, a real client, and what it was told."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from grpc_interceptors import ResilienceInterceptor
from resilience import PROCEED, Admission, Call, Outcome, Pipeline, Policy, Verdict

Pair = tuple[str, str | bytes]
Act = Callable[[Any], Awaitable[bytes]]

SERVICE = "test.Things"
GO = f"/{SERVICE}/Go"
SECRET = "postgres://admin:hunter2@db"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@dataclass
class Told:
    """What the client knows once a call is over."""

    code: grpc.StatusCode
    details: str
    replies: list[bytes]
    trailers: list[Pair]
    initial: list[Pair]

    def get(self, name: str) -> str | None:
        """Return the one trailer of that name, or None; two of them are an error."""
        found = self.get_all(name)
        assert len(found) <= 1, f"{name} was sent {len(found)} times: {found}"
        return str(found[0]) if found else None

    def get_all(self, name: str) -> list[str | bytes]:
        return [value for key, value in self.trailers if key == name]


async def told(call: Any, replies: Sequence[bytes] = ()) -> Told:
    """Wait until ``call`` is over."""
    code = await call.code()
    return Told(
        code,
        await call.details() or "",
        list(replies),
        list(await call.trailing_metadata() or ()),
        list(await call.initial_metadata() or ()),
    )


async def ask(
    channel: grpc.aio.Channel,
    path: str = GO,
    kind: str = "unary_unary",
    *metadata: Pair,
    send: Sequence[bytes] = (b"one",),
    deadline: float | None = None,
) -> Told:
    """Call a method with raw bytes, take every reply, and tell how it ended."""
    call = start(channel, path, kind, *metadata, send=send, deadline=deadline)
    replies: list[bytes] = []
    try:
        if kind.startswith("stream_"):
            for message in send:
                await call.write(message)
            await call.done_writing()
        if kind.endswith("_stream"):
            async for reply in call:
                replies.append(reply)  # noqa: PERF401 - those before an error count, too
        else:
            replies.append(await call)
    except grpc.aio.AioRpcError:
        pass  # the call tells
    return await told(call, replies)


def start(
    channel: grpc.aio.Channel,
    path: str = GO,
    kind: str = "unary_unary",
    *metadata: Pair,
    send: Sequence[bytes] = (b"one",),
    deadline: float | None = None,
) -> Any:
    """Begin a call; a stream of requests has sent nothing yet."""
    stub: Any = getattr(channel, kind)(path)
    first = () if kind.startswith("stream_") else (send[0],)
    return stub(*first, metadata=metadata, timeout=deadline)


def complaints(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what was logged as wrong; but for asyncio, where grpc's poller grumbles about the loops of other tests."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING and record.name != "asyncio"]


@dataclass
class Witness:
    """A policy that lets everything pass and remembers what it was told."""

    calls: list[Call] = field(default_factory=list)
    outcomes: "asyncio.Queue[Outcome]" = field(default_factory=asyncio.Queue)

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        self.calls.append(call)
        admission.on_settle(self.outcomes.put)
        return PROCEED


def retries(code: str, attempts: int = 3) -> tuple[str, Any]:
    """Return the channel option of a client that retries ``code``; five seconds apart, unless it is told otherwise."""
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "5s",
        "maxBackoff": "5s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": [code],
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
    return "grpc.service_config", json.dumps(config)


Handlers = Mapping[str, Any]
"""Method handlers by their full names."""


def generic(handlers: Handlers) -> list[grpc.GenericRpcHandler]:
    services: dict[str, dict[str, Any]] = {}
    for name, handler in handlers.items():
        service, _, method = name[1:].partition("/")
        services.setdefault(service, {})[method] = handler
    return [grpc.method_handlers_generic_handler(service, methods) for service, methods in services.items()]


def make_server(pipeline: Pipeline, handlers: Handlers, *before: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    server = grpc.aio.server(interceptors=[*before, ResilienceInterceptor(pipeline)])
    server.add_generic_rpc_handlers(generic(handlers))
    return server


@asynccontextmanager
async def connected(server: grpc.aio.Server, *options: tuple[str, Any]) -> AsyncIterator[grpc.aio.Channel]:
    """Serve on a free port, and bound the whole test."""
    async with asyncio.timeout(10):
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                yield channel
        finally:
            await server.stop(None)


@asynccontextmanager
async def serving(
    handlers: Handlers | Any, *policies: Policy, pipeline: Pipeline | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """Serve ``handlers``, or one handler as ``GO``, behind ``policies``."""
    by_name = handlers if isinstance(handlers, Mapping) else {GO: handlers}
    async with connected(make_server(pipeline or Pipeline(policies), by_name)) as channel:
        yield channel


@dataclass(frozen=True)
class Style:
    """One way to write a handler: its kind of method, and a handler that takes all requests, then acts."""

    kind: str
    make: Callable[[Act], Any]


def _unary_unary(act: Act) -> Any:
    async def handle(_request: bytes, context: Any) -> bytes:
        return await act(context)

    return grpc.unary_unary_rpc_method_handler(handle)


def _unary_stream_generator(act: Act) -> Any:
    async def handle(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield await act(context)

    return grpc.unary_stream_rpc_method_handler(handle)


def _unary_stream_writer(act: Act) -> Any:
    async def handle(_request: bytes, context: Any) -> None:
        await context.write(await act(context))

    return grpc.unary_stream_rpc_method_handler(handle)


def _stream_unary_iterator(act: Act) -> Any:
    async def handle(requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for _ in requests:
            pass
        return await act(context)

    return grpc.stream_unary_rpc_method_handler(handle)


def _stream_unary_reader(act: Act) -> Any:
    async def handle(_requests: object, context: Any) -> bytes:
        while await context.read() is not grpc.aio.EOF:
            pass
        return await act(context)

    return grpc.stream_unary_rpc_method_handler(handle)


def _stream_stream_generator(act: Act) -> Any:
    async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            pass
        yield await act(context)

    return grpc.stream_stream_rpc_method_handler(handle)


def _stream_stream_reader_writer(act: Act) -> Any:
    async def handle(_requests: object, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            pass
        await context.write(await act(context))

    return grpc.stream_stream_rpc_method_handler(handle)


STYLES = {
    "unary_unary": Style("unary_unary", _unary_unary),
    "unary_stream_generator": Style("unary_stream", _unary_stream_generator),
    "unary_stream_writer": Style("unary_stream", _unary_stream_writer),
    "stream_unary_iterator": Style("stream_unary", _stream_unary_iterator),
    "stream_unary_reader": Style("stream_unary", _stream_unary_reader),
    "stream_stream_generator": Style("stream_stream", _stream_stream_generator),
    "stream_stream_reader_writer": Style("stream_stream", _stream_stream_reader_writer),
}


async def ok(_context: Any) -> bytes:
    return b"done"


async def aborts(context: Any) -> bytes:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Not yet")
    raise AssertionError("abort returned")


async def crashes(_context: Any) -> bytes:
    raise ValueError(SECRET)


async def sets_code(context: Any) -> bytes:
    context.set_code(grpc.StatusCode.NOT_FOUND)
    context.set_details("Nothing there")
    return b""


async def leaks(_context: Any) -> bytes:
    inner = asyncio.create_task(asyncio.Event().wait())
    inner.cancel()
    await inner
    raise AssertionError("the inner task was cancelled")


@dataclass
class Waits:
    """Acts by waiting, until released or cut."""

    runs: int = 0
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, _context: Any) -> bytes:
        self.runs += 1
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cut.set()
            raise
        return b"done"


@dataclass
class Counts:
    """Acts, and counts how often; each reply is another."""

    act: Act | None = None
    runs: int = 0

    async def __call__(self, context: Any) -> bytes:
        self.runs += 1
        return await self.act(context) if self.act is not None else b"run %d" % self.runs


SyncAct = Callable[[Any], bytes]


@dataclass(frozen=True)
class SyncStyle:
    """One way to write a handler as a plain function: it takes all requests, then acts."""

    kind: str
    make: Callable[[SyncAct], Any]


def _sync_unary_unary(act: SyncAct) -> Any:
    return grpc.unary_unary_rpc_method_handler(lambda _request, context: act(context))


def _sync_unary_stream_generator(act: SyncAct) -> Any:
    def handle(_request: bytes, context: Any) -> Iterator[bytes]:
        yield act(context)

    return grpc.unary_stream_rpc_method_handler(handle)


def _sync_unary_stream_list(act: SyncAct) -> Any:
    return grpc.unary_stream_rpc_method_handler(lambda _request, context: [act(context)])


def _sync_stream_unary(act: SyncAct) -> Any:
    def handle(requests: Iterator[bytes], context: Any) -> bytes:
        assert list(requests) in ([], [b"one"])
        return act(context)

    return grpc.stream_unary_rpc_method_handler(handle)


def _sync_stream_stream_generator(act: SyncAct) -> Any:
    def handle(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        assert list(requests) in ([], [b"one"])
        yield act(context)

    return grpc.stream_stream_rpc_method_handler(handle)


SYNC_STYLES = {
    "unary_unary": SyncStyle("unary_unary", _sync_unary_unary),
    "unary_stream_generator": SyncStyle("unary_stream", _sync_unary_stream_generator),
    "unary_stream_list": SyncStyle("unary_stream", _sync_unary_stream_list),
    "stream_unary": SyncStyle("stream_unary", _sync_stream_unary),
    "stream_stream_generator": SyncStyle("stream_stream", _sync_stream_stream_generator),
}
"""Handlers that are plain functions: each runs in a thread."""
