"""How a handler of the matrix is written: each style takes all requests, replies early if it shall, and acts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

SENT = (b"one", b"two")
EARLY = b"early"

Take = Callable[[Any, Any], Awaitable[None]]
Act = Callable[[Any], Any]


async def one(request: Any, _context: Any) -> None:
    assert request == SENT[0]


async def iterates(requests: Any, _context: Any) -> None:
    await _whole([request async for request in requests])


async def reads(_requests: Any, context: Any) -> None:
    seen = []
    while (message := await context.read()) is not grpc.aio.EOF:
        seen.append(message)
    await _whole(seen)


async def _whole(seen: list[bytes]) -> None:
    # Of a stream that was cancelled grpc tells the end first: the next await says why.
    if tuple(seen) != SENT:
        await asyncio.Event().wait()


def returning(take: Take) -> Any:
    def make(act: Act, _early: bool) -> Any:
        async def handle(request: Any, context: Any) -> Any:
            await take(request, context)
            return await act(context)

        return handle

    return make


def writing(take: Take) -> Any:
    def make(act: Act, early: bool) -> Any:
        async def handle(request: Any, context: Any) -> None:
            await take(request, context)
            if early:
                await context.write(EARLY)
            await context.write(await act(context))

        return handle

    return make


def yielding(take: Take) -> Any:
    def make(act: Act, early: bool) -> Any:
        async def handle(request: Any, context: Any) -> AsyncIterator[bytes]:
            await take(request, context)
            if early:
                yield EARLY
            yield await act(context)

        return handle

    return make


def _take(request: Any) -> None:
    assert (request,) == SENT[:1] or tuple(request) == SENT


def sync_returning(act: Act, _early: bool) -> Any:
    def handle(request: Any, context: Any) -> Any:
        _take(request)
        return act(context)

    return handle


def sync_yielding(act: Act, early: bool) -> Any:
    def handle(request: Any, context: Any) -> Iterator[bytes]:
        _take(request)
        if early:
            yield EARLY
        yield act(context)

    return handle


def sync_listing(act: Act, _early: bool) -> Any:
    def handle(request: Any, context: Any) -> list[bytes]:
        _take(request)
        return [act(context)]

    return handle


def decorated(inner: Any) -> Any:
    """Hide an async handler behind a plain decorator: grpc takes what it returns for a function of a thread."""

    def make(act: Act, early: bool) -> Any:
        handle = inner(act, early)

        def call(*arguments: Any) -> Any:
            return handle(*arguments)

        return call

    return make


@dataclass(frozen=True, slots=True)
class Style:
    """One way to write a handler."""

    kind: str
    make: Callable[[Act, bool], Any]
    sync: bool = False


STYLES = {
    "unary": Style("unary_unary", returning(one)),
    "unary_stream_generator": Style("unary_stream", yielding(one)),
    "unary_stream_writer": Style("unary_stream", writing(one)),
    "stream_unary_iterator": Style("stream_unary", returning(iterates)),
    "stream_unary_reader": Style("stream_unary", returning(reads)),
    "stream_stream_generator": Style("stream_stream", yielding(iterates)),
    "stream_stream_reader_writer": Style("stream_stream", writing(reads)),
    "plain_unary": Style("unary_unary", sync_returning, sync=True),
    "plain_unary_stream_generator": Style("unary_stream", sync_yielding, sync=True),
    "plain_unary_stream_list": Style("unary_stream", sync_listing, sync=True),
    "plain_stream_unary": Style("stream_unary", sync_returning, sync=True),
    "plain_stream_stream_generator": Style("stream_stream", sync_yielding, sync=True),
    "decorated_unary": Style("unary_unary", decorated(returning(one))),
    "decorated_unary_stream_generator": Style("unary_stream", decorated(yielding(one))),
    "decorated_unary_stream_writer": Style("unary_stream", decorated(writing(one))),
    "decorated_stream_unary": Style("stream_unary", decorated(returning(iterates))),
    "decorated_stream_stream_generator": Style("stream_stream", decorated(yielding(iterates))),
}
SLOW_STARTERS = ("plain_unary_stream_list",)
"""Styles that stream, but can't reply before they act."""


def path(style: str, act: str, *, early: bool) -> str:
    """Return the method of ``style`` that does ``act``, after a first reply if ``early``."""
    return f"/matrix.{style}{'.early' if early else ''}/{act}"
