"""Floor 4: one RPC from its opening to its end: admitted, run, told, settled."""

import asyncio
import logging
from contextvars import ContextVar
from time import monotonic
from typing import Any, NoReturn, Self

import grpc
from grpc.aio import AbortError, InternalError

from grpc_interceptors.call import GrpcCall, Pairs
from grpc_interceptors.context import GuardedContext
from grpc_interceptors.encoding import bytes_of
from grpc_interceptors.incoming import Incoming, Requests, drain
from grpc_interceptors.malformed import Malformed, MalformedRequestError, undecodable
from grpc_interceptors.method import Method
from grpc_interceptors.precedence import Asked
from grpc_interceptors.render import kept_trailers, render_error_reply, render_reject, replayed_trailers
from resilience import wire
from resilience.errors import ResilienceError
from resilience.pipeline import Pipeline
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Reply, Verdict

logger = logging.getLogger("resilience")

carried: "ContextVar[Pairs | Serving | None]" = ContextVar("resilience_rpc", default=None)
"""From part to part of the running RPC, in one task: its metadata, from the interceptor to the handler (asking the
context costs 5 us more), and then what serves it, from the handler to the serialiser."""

_NO_MESSAGE = frozenset({Incoming, Malformed})

_LONGEST = 366 * 86_400.0  # Seconds. What is over it is no deadline, and grpc's clients would take it for a past one.


class Serving:
    """One RPC: admitted on entry, and ended on exit with a status that says no more than it should.

    Args:
        method: the method called.
        pipeline: the policies.
        asked: those that concern the method.
        request: the message, or the iterator.
        context: the real servicer context.
        early: whether the message has yet to be waited for, once the call is admitted.
    """

    # What most calls never set stands at the class.
    stored: tuple[Any, bytes] | None = None
    """The reply that is about to leave, and the bytes it must leave as: what is stored is what was sent."""
    _deadline: float | None = None
    _kept = False

    def __init__(
        self, method: Method, pipeline: Pipeline, asked: Asked, request: Any, context: Any, *, early: bool
    ) -> None:
        known = carried.get()
        pairs: Pairs = context.invocation_metadata() if known is None or isinstance(known, Serving) else known
        left = context.time_remaining()
        if left is not None and left < _LONGEST:
            self._deadline = monotonic() + left
        peer = context.peer()
        self._method = method
        self._pipeline = pipeline
        self._asked = asked
        self.context = GuardedContext(context, pairs, peer)
        if early:
            request = Incoming(self.context)
        self.request = Requests(request, self.context) if method.request_streaming else request
        call = GrpcCall(method.name, pairs, peer, request, streaming=method.streaming, safe=method.safe)
        self.admission = self.context.admission = pipeline.admit(call)

    async def admit(self) -> Verdict:
        """Open the call and ask its policies. What it raises, a refusal included, ends the RPC by way of ``fail``."""
        carried.set(self)
        admission, asked = self.admission, self._asked
        admission.enter()
        verdict = await admission.admit(self._pipeline.edge)
        if self._deadline is not None and admission.context:
            admission.context.set_deadline(self._deadline, monotonic)
        if verdict is PROCEED and asked.core:
            verdict = await admission.admit(asked.core)
        if verdict is PROCEED and asked.specific is not None:
            verdict = await asked.specific.admit(admission)
        if verdict is PROCEED:
            if type(self.request) in _NO_MESSAGE:
                self.request = await _message(self.request)
        elif isinstance(verdict, Reject):
            await self._refuse(verdict)
        if self._method.streaming:
            self.context.tell()  # an interceptor further out may end it while it streams
        return verdict

    async def __aenter__(self) -> Self:
        try:
            await self.admit()
        except BaseException as error:
            await self.fail(error)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None:
            await self.fail(error)
        elif self.is_unsettled():
            await self.settle()

    def is_unsettled(self) -> bool:
        """Tell the RPC its trailers; close it, unless somebody waits to hear how it ended."""
        self.context.tell()
        if self.admission.hooked:
            return True
        self.admission.close()
        return False

    async def settle(self) -> None:
        """Tell how the RPC ended that raised nothing, and close it."""
        if self.context.status is not None or self.admission.verdict is not PROCEED:
            await self._settle(self._ended())
        await self.admission.leave()

    async def _refuse(self, reject: Reject) -> NoReturn:
        if self._method.request_streaming:
            await drain(self.request)
        await render_reject(reject, self.admission, self.context)

    async def fail(self, error: BaseException) -> None:
        """End the RPC that ``error`` ends. Raises what shall leave in its place, if anything shall."""
        context, admission = self.context, self.admission
        if isinstance(self.request, Incoming):
            self.request.drop()
        if isinstance(error, InternalError):
            await self._fail_at_sending(error)
        cut = isinstance(error, asyncio.CancelledError) and (context.departed or _is_cancelled())
        accident = isinstance(error, (Exception, asyncio.CancelledError)) and not (cut or isinstance(error, AbortError))
        code, told = context.status or grpc.StatusCode.INTERNAL, "Internal error"
        if isinstance(error, MalformedRequestError):
            code, told = error.code, str(error)
            fields = admission.context.log_fields()
            logger.warning("%s was sent what it doesn't take: %s", self._method.name, told, extra=fields)
        elif accident:
            self._log_failure(error)
        if isinstance(error, AbortError) or context.departed:
            await self._settle(self._ended())
        await admission.leave(None if isinstance(admission.verdict, Reject) else type(error))
        if accident:
            # Exception text may hold anything; a CancelledError that leaked would leave the client without a status.
            await context.refuse(code, told)
        await context.send_held()
        context.tell()

    async def _fail_at_sending(self, error: InternalError) -> None:
        """End an RPC whose client could not be sent something: most likely it has left, and a status will tell."""
        try:
            await self.context.refuse(grpc.StatusCode.INTERNAL, "Internal error")
        except AbortError:
            self._log_failure(error)
            await self.admission.leave(type(error))
            raise
        except asyncio.CancelledError:
            await self.admission.leave(asyncio.CancelledError)
            raise

    def _log_failure(self, error: BaseException) -> None:
        logger.error("%s failed", self._method.name, exc_info=error, extra=self.admission.context.log_fields())

    async def _settle(self, outcome: Outcome) -> None:
        if not self._kept:
            await self.admission.settle(outcome)

    def _ended(self) -> Outcome:
        if isinstance(self.admission.verdict, Reject):
            return Outcome("refused")
        code = 0 if self.context.status is None else self.context.status.value[0]
        return Outcome("completed" if wire.is_final_grpc(code) else "failed")

    def fail_to_serialize(self, error: Exception, *, lone: bool) -> bytes:
        """Tell of a reply that can't be turned into bytes like of any other error of the handler."""
        fields = self.admission.context.log_fields()
        logger.error("%s made a reply that can't be serialised", self._method.name, exc_info=error, extra=fields)
        self.context.set_code(grpc.StatusCode.INTERNAL)
        self.context.set_details("Internal error")
        if lone:
            return b""  # grpc asks last for the bytes of a lone reply, and then for the status
        self.context.tell()
        raise ResilienceError("Internal error") from error

    async def answer_late(self, verdict: Verdict) -> Any:
        """Answer as ``answer`` does, for a policy that was asked inside of the handler."""
        try:
            return await self.answer(verdict)
        except BaseException as error:
            await self.fail(error)
            raise

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
        self.stored = (message, reply.body)
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
        finally:
            del task  # else its error would keep this frame, and this frame the task
        self.stored = (message, data)
        return message

    async def _run(self, inner: Any) -> tuple[Any, bytes]:
        settle = self.admission.settle
        try:
            message = await inner(self.request, self.context)
            self.context.insist()
            data = b"" if self.context.status is not None else bytes_of(message, self._method.serialize)
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


async def _message(request: Any) -> Any:
    if isinstance(request, Incoming):
        request = await request.message()
    if isinstance(request, Malformed):
        raise undecodable()
    return request


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
