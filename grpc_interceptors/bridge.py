"""Floor 4: plain functions as handlers: each runs in a thread, and its RPC stays on the event loop.

Nothing in the thread touches the RPC itself: it asks the loop, or leaves word of how the RPC shall end. So the end
is sent by the RPC's own task, after the last reply, and a thread that outlives its RPC finds it over, not freed.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import aclosing, nullcontext
from contextvars import copy_context
from functools import partial
from inspect import isasyncgenfunction, isawaitable, iscoroutine, iscoroutinefunction
from threading import get_ident
from time import monotonic
from typing import Any, NoReturn

import grpc

from grpc_interceptors.context import GuardedContext
from grpc_interceptors.thread_context import ThreadContext, ThreadRequests

_CHECK_SECONDS = 1.0  # How long a thread waits on a loop that may have been closed meanwhile.

Outcome = tuple[Any, BaseException | None]


def bridged(function: Any, executor: Executor, *, streams: bool) -> Any:
    """Return an ``async`` handler for a plain one: an async generator function where it ``streams`` its replies.

    A callable whose ``__call__`` is ``async`` is called as it is. What else returns an awaitable or an async iterator
    is called in a thread, and awaited or iterated on the loop.

    Args:
        function: the handler.
        executor: where it runs; one thread for one RPC, from its first line to its last.
        streams: whether it sends many replies.
    """
    call = getattr(function, "__call__", None)  # noqa: B004 - its style is asked for, not whether there is one
    if iscoroutinefunction(call) or isasyncgenfunction(call):
        return call

    async def once(request: Any, context: GuardedContext) -> Any:
        rpc = Bridge(context)
        try:
            reply = await rpc.run(executor, partial(rpc.call, function, request))
            return await reply if isawaitable(reply) else reply
        finally:
            rpc.close()

    async def many(request: Any, context: GuardedContext) -> AsyncIterator[Any]:
        rpc = Bridge(context)
        try:
            async with aclosing(rpc.replies(executor, partial(rpc.produce, function, request))) as replies:
                async for reply in replies:
                    yield reply
        finally:
            rpc.close()

    return many if streams else once


class Bridge:
    """One RPC between its task and its thread. The loop's side writes; the thread's side reads, asks and waits."""

    __slots__ = (
        "_errands",
        "_items",
        "_offered",
        "_owner",
        "_unawaited",
        "context",
        "deadline",
        "ending",
        "finished",
        "loop",
        "over",
    )

    def __init__(self, context: GuardedContext) -> None:
        self.context = context
        self.loop = asyncio.get_running_loop()
        left = context.time_remaining()
        self.deadline = None if left is None else monotonic() + left
        self.ending: tuple[grpc.StatusCode, str, Sequence[Any]] | None = None
        """How the handler wants the RPC to end, if it aborted or cancelled."""
        self.finished = False
        """Whether the handler ended by itself."""
        self.over = False
        """Whether the loop's side has ended: nothing more is sent or read."""
        self._owner = get_ident()
        self._errands: set[asyncio.Task[Any]] = set()
        self._items: asyncio.Queue[tuple[Any, Future[None]] | None] = asyncio.Queue()
        self._offered: Future[None] | None = None
        # What the thread returned for the loop to await, which may have left meanwhile.
        self._unawaited: Coroutine[Any, Any, Any] | None = None
        context.admission.from_thread = self.ask

    # -- on the loop

    def is_here(self) -> bool:
        """Tell whether this is the thread of the loop."""
        return get_ident() == self._owner

    async def run(self, executor: Executor, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returned in its thread, or end the RPC as the handler asked."""
        job = self._start(executor, work)
        try:
            await self._items.get()
            return await self._outcome(job)
        finally:
            job.cancel()  # one that still waits for a thread needs none any more

    async def replies(self, executor: Executor, work: Callable[[], Any]) -> AsyncGenerator[Any, None]:
        """Yield each reply; the thread makes the next one when this one was taken."""
        job = self._start(executor, work)
        try:
            while (item := await self._items.get()) is not None:
                yield item[0]
                if not item[1].done():
                    item[1].set_result(None)
            rest = await self._outcome(job)
            if isawaitable(rest):
                await rest
            elif rest is not None:
                async with aclosing(rest) if hasattr(rest, "aclose") else nullcontext():
                    async for reply in rest:
                        yield reply
        finally:
            job.cancel()

    def close(self) -> None:
        """End the loop's side, and with it whatever the thread waits for."""
        self.over = True
        if self._offered is not None:
            self._offered.cancel()
        if self._unawaited is not None:
            self._unawaited.close()
        for errand in self._errands:
            errand.cancel()
        self.context.admission.from_thread = _ask_nobody  # else each would keep the other until the next collection

    def cancel(self) -> None:
        """End the RPC although its handler runs on."""
        self.ending = (grpc.StatusCode.CANCELLED, "Cancelled by the server", ())
        self._items.put_nowait(None)

    def _start(self, executor: Executor, work: Callable[[], Any]) -> "asyncio.Future[Outcome]":
        job = self.loop.run_in_executor(executor, copy_context().run, self._told, work)
        job.add_done_callback(lambda _job: self._items.put_nowait(None))
        return job

    async def _outcome(self, job: "asyncio.Future[Outcome]") -> Any:
        self.finished = job.done()
        if self.ending is not None:
            await self.context.abort(*self.ending)
        value, error = job.result()
        if error is None:
            return value
        if isinstance(error, (Exception, asyncio.CancelledError)):
            raise error
        raise RuntimeError("A handler tried to end its process or thread") from error

    def _offer(self, reply: Any, taken: "Future[None]") -> None:
        if self.over:
            taken.cancel()
            return
        self._offered = taken
        self._items.put_nowait((reply, taken))

    async def _errand(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if self.over:
            raise _over()
        task: Any = asyncio.current_task()
        self._errands.add(task)
        try:
            return await work()
        finally:
            self._errands.discard(task)

    # -- in the thread

    def call(self, function: Any, request: Any) -> Any:
        """Call the handler with what a thread can use."""
        return function(
            ThreadRequests(self, request) if hasattr(request, "__aiter__") else request, ThreadContext(self)
        )

    def produce(self, function: Any, request: Any) -> Any:
        """Send each reply; return what only the loop can await or iterate."""
        replies = self.call(function, request)
        if isawaitable(replies) or isinstance(replies, AsyncIterable):
            return replies
        try:
            for reply in replies:
                self._put(reply)
        finally:
            if isinstance(replies, Generator):
                replies.close()
        return None

    def ask(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run ``work`` on the loop and return its result; raises ``RpcError`` once the RPC is over."""
        return self._send(self._errand(work))

    def do(self, step: Callable[[], Any]) -> Any:
        """Take one step on the loop and return its result, whether the RPC is over or not."""
        if self.is_here():
            return step()

        async def take() -> Any:
            return step()

        return self._send(take())

    def _told(self, work: Callable[[], Any]) -> Outcome:
        # As a value: a future refuses StopIteration, and its RPC would hang.
        try:
            value = None if self.over else work()
        except BaseException as error:
            # An abort has left word, and its error would be a circle: with its frames, whose future keeps it.
            return None, error if self.ending is None else None
        if iscoroutine(value):
            self._unawaited = value
            if self.over:
                value.close()
        return value, None

    def _put(self, reply: Any) -> None:
        taken: Future[None] = Future()
        try:
            self.loop.call_soon_threadsafe(self._offer, reply, taken)
        except RuntimeError:
            raise _over() from None
        self._wait(taken)

    def _send(self, errand: Coroutine[Any, Any, Any]) -> Any:
        try:
            future = asyncio.run_coroutine_threadsafe(errand, self.loop)
        except RuntimeError:  # the loop is closed
            errand.close()
            raise _over() from None
        return self._wait(future)

    def _wait(self, future: "Future[Any]") -> Any:
        while not future.done():
            try:
                future.exception(_CHECK_SECONDS)
            except (TimeoutError, CancelledError):
                if self.loop.is_closed():
                    break
        if not future.done() or future.cancelled():
            raise _over()
        return future.result()


def _ask_nobody(_work: object) -> NoReturn:
    raise _over()


def _over() -> grpc.RpcError:
    return grpc.RpcError("The RPC is over")
