"""Floor 4: one RPC from its opening to its end, and the wrappers that keep each handler's own style.

The style is kept because outer interceptors rely on it: a generator stays a generator, a coroutine a coroutine.
"""

import asyncio
import logging
from concurrent.futures import Executor
from contextlib import aclosing
from contextvars import ContextVar
from inspect import isasyncgenfunction, iscoroutinefunction
from time import monotonic
from typing import Any, Self

import grpc
from grpc.aio import AbortError

from grpc_interceptors.bridge import bridged
from grpc_interceptors.call import Pairs, call_from_context
from grpc_interceptors.context import GuardedContext
from grpc_interceptors.method import Handler, Method
from grpc_interceptors.render import kept_trailers, render_error_reply, render_reject, replayed_trailers
from resilience import wire
from resilience.admission import Refused
from resilience.decorators import Declared, declared
from resilience.errors import ResilienceError
from resilience.pipeline import Pipeline
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Reply, Verdict

logger = logging.getLogger("resilience")

invocation: ContextVar[Pairs | None] = ContextVar("resilience_invocation", default=None)
"""The running RPC's metadata, from the interceptor to the handler in one task; asking the context costs 5 us more."""

# From the handler to the serialiser of the same RPC, in one task.
_serving: ContextVar["Serving | None"] = ContextVar("resilience_serving", default=None)

_DRAIN_SECONDS, _DRAIN_MESSAGES = 0.1, 100


class Serving:
    """One RPC: admitted on entry, and ended on exit with a status that says no more than it should.

    Args:
        method: the method called.
        pipeline: the policies.
        request: the message or the iterator.
        context: the real servicer context.
        known: what decorators declare at the handler, or None.
    """

    __slots__ = ("_kept", "_known", "_method", "_pipeline", "_request", "_stored", "_told", "admission", "context")

    def __init__(self, method: Method, pipeline: Pipeline, request: Any, context: Any, known: Declared | None) -> None:
        pairs = invocation.get()
        if pairs is None:
            pairs = context.invocation_metadata()
        self._method = method
        self._pipeline = pipeline
        self._request = request
        self.context = GuardedContext(context, pairs)
        call = call_from_context(
            method.name, pairs, self.context.peer(), request, streaming=method.streaming, safe=method.safe
        )
        self.admission = pipeline.admit(call)
        self.context.instead = self._insist_on_refusal
        self._told = 0
        self._kept = False
        self._known = known
        # The reply that is about to leave, and the bytes it must leave as: what is stored is what was sent.
        self._stored: tuple[Any, bytes] | None = None

    async def __aenter__(self) -> Self:
        _serving.set(self)
        try:
            await self.admission.__aenter__()
            left = self.context.time_remaining()
            if left is not None and self.admission.context:
                self.admission.context.set_deadline(monotonic() + left, monotonic)
            self.context.add_trailers(self.admission.metadata)
            verdict = self.admission.verdict
            if not isinstance(verdict, Reject):
                verdict = await self.admission.admit(self._pipeline.core)
            if verdict is PROCEED and self._known is not None:
                verdict = await self._known.admit(self.admission)
            self._told = len(self.admission.metadata)
            self.context.tell()
            if isinstance(verdict, Reject):
                if self._method.request_streaming:
                    await drain(self._request)
                await render_reject(verdict, self.admission, self.context)
        except BaseException as error:
            await self.__aexit__(type(error), error)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is None:
            if len(self.admission.metadata) != self._told:
                self.context.tell()
            await self._settle(self._ended())
            await self.admission.__aexit__(None)
            return
        leaked = isinstance(error, asyncio.CancelledError) and not _is_cancelled()
        accident = leaked or (isinstance(error, Exception) and not isinstance(error, AbortError))
        if accident:
            logger.error("%s failed", self._method.name, exc_info=error, extra=self.admission.context.log_fields())
        if isinstance(self.admission.verdict, Reject):
            kind = None
        elif isinstance(error, AbortError):
            await self._settle(self._ended())
        await self.admission.__aexit__(kind)
        if accident:
            # Exception text may hold anything; a CancelledError that leaked would leave the client without a status.
            await self.context.refuse(self.context.status or grpc.StatusCode.INTERNAL, "Internal error")
        await self.context.send_held()

    async def _settle(self, outcome: Outcome) -> None:
        if not self._kept:
            await self.admission.settle(outcome)

    def _ended(self) -> Outcome:
        if isinstance(self.admission.verdict, Reject):
            return Outcome("refused")
        code = 0 if self.context.status is None else self.context.status.value[0]
        return Outcome("completed" if wire.is_final_grpc(code) else "failed")

    def serialize(self, message: Any, serializer: Any) -> bytes:
        """Turn a reply into its bytes, for grpc; an error in it is told like any other of the handler."""
        if self._stored is not None and self._stored[0] is message:
            return self._stored[1]
        try:
            data: bytes = message if serializer is None else serializer(message)
        except Exception as error:
            fields = self.admission.context.log_fields()
            logger.exception("%s made a reply that can't be serialised", self._method.name, extra=fields)
            self.context.set_code(grpc.StatusCode.INTERNAL)
            self.context.set_details("Internal error")
            raise ResilienceError("Internal error") from error
        return data

    async def _insist_on_refusal(self) -> None:
        # An interceptor further in, which maps exceptions to statuses, has caught a refusal.
        if isinstance(self.admission.verdict, Reject):
            await render_reject(self.admission.verdict, self.admission, self.context)

    async def answer(self, verdict: Verdict) -> Any:
        """Return, or abort with, what a policy answers in the handler's place."""
        if isinstance(verdict, Replay):
            if verdict.reply.code != 0:
                await render_error_reply(verdict.reply, self.context)
            return self.replay(verdict.reply)
        if isinstance(verdict, Reject):
            await render_reject(verdict, self.admission, self.context)
        return None

    def replay(self, reply: Reply) -> Any:
        """Return what makes grpc send a stored OK again, byte for byte."""
        self.context.set_trailing_metadata(replayed_trailers(reply))
        message = self._method.parse(reply.body)
        self._stored = (message, reply.body)
        return message

    async def keep(self, inner: Any) -> Any:
        """Run the handler where its client can't cut it, and return its reply once that is stored."""
        self._kept = True
        self.admission.hand_over()
        self.context.hold()
        task = self._pipeline.outlive(self._run(inner))
        try:
            message, data = await asyncio.shield(task)
        except asyncio.CancelledError:
            self.context.detach()
            task.add_done_callback(self._report)
            raise
        self._stored = (message, data)
        return message

    async def _run(self, inner: Any) -> tuple[Any, bytes]:
        settle = self.admission.settle
        try:
            message = await inner(self._request, self.context)
            self.context.insist()
            data = b"" if self.context.status is not None else self._method.serialize(message)
        except AbortError:
            await settle(self._outcome(b""))
            raise
        except BaseException as error:
            await settle(Outcome("failed" if isinstance(error, Exception) else "cancelled"))
            raise
        await settle(self._outcome(data))
        return message, data

    def _outcome(self, data: bytes) -> Outcome:
        context = self.context
        code = 0 if context.status is None else context.status.value[0]
        body = data if code == 0 else context.details().encode()
        kept = len(body) <= self.admission.capture
        reply = Reply("grpc", code, kept_trailers(context.trailing_metadata()), body) if kept else None
        return Outcome("completed" if wire.is_final_grpc(code) else "failed", reply)

    def _report(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), AbortError):
            fields = self.admission.context.log_fields()
            logger.error("%s failed after its client left", self._method.name, exc_info=task.exception(), extra=fields)


def wrap(method: Method, handler: Handler, pipeline: Pipeline, executor: Executor) -> Handler:
    """Return ``handler`` behind ``pipeline``, of the same kind and style; a plain function runs in ``executor``."""
    inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    known = declared(inner)
    if not (isasyncgenfunction(inner) or iscoroutinefunction(inner)):
        inner = bridged(inner, executor, streams=bool(handler.response_streaming))

    async def reply_once(request: Any, context: Any) -> Any:
        async with Serving(method, pipeline, request, context, known) as serving:
            if serving.admission.verdict is not PROCEED:
                return await serving.answer(serving.admission.verdict)
            try:
                if serving.admission.capture:
                    return await serving.keep(inner)
                return await inner(request, serving.context)
            except Refused as refused:
                return await serving.answer(refused.verdict)

    async def reply_many(request: Any, context: Any) -> Any:
        async with (
            Serving(method, pipeline, request, context, known) as serving,
            aclosing(inner(request, serving.context)) as replies,
        ):
            try:
                async for reply in replies:
                    yield reply
            except Refused as refused:
                await serving.answer(refused.verdict)

    guarded: Any = reply_many if isasyncgenfunction(inner) else reply_once
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    guard: Handler = make(guarded, handler.request_deserializer, _guarded(handler.response_serializer))
    return guard


def _guarded(serializer: Any) -> Any:
    def serialize(message: Any) -> bytes:
        serving = _serving.get()
        if serving is not None:
            return serving.serialize(message, serializer)
        data: bytes = message if serializer is None else serializer(message)
        return data

    return serialize


async def drain(requests: Any) -> None:
    """Read what a client still sends, for a moment.

    The aio client of Python reports INTERNAL, without a trailer, where a stream is refused while it writes.
    """
    try:
        async with asyncio.timeout(_DRAIN_SECONDS), aclosing(aiter(requests)) as rest:
            seen = 0
            async for _ in rest:
                seen += 1
                if seen == _DRAIN_MESSAGES:
                    return
    except TimeoutError:
        return


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
