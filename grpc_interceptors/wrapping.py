"""Floor 4: wrappers that keep each handler's own style: a generator stays a generator, a coroutine a coroutine.

Outer interceptors rely on it.
"""

from concurrent.futures import Executor
from contextlib import aclosing
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Any

import grpc

from grpc_interceptors.bridge import bridged
from grpc_interceptors.encoding import bytes_of
from grpc_interceptors.malformed import decoder
from grpc_interceptors.method import Handler, Method
from grpc_interceptors.precedence import Asked, in_precedence
from grpc_interceptors.serving import Serving, carried
from resilience.admission import Refused
from resilience.decorators import declared
from resilience.pipeline import Pipeline
from resilience.verdict import PROCEED


def wrap(
    method: Method, handler: Handler, pipeline: Pipeline, executor: Executor, *, before_body: bool = False
) -> Handler:
    """Return ``handler`` behind ``pipeline``, of the same kind and style.

    Args:
        method: what is known of it.
        handler: the application's own, or an interceptor's that is further in.
        pipeline: the policies.
        executor: where a plain function runs.
        before_body: ask the policies before a unary request's message has come. Then the handler is, to interceptors
            further out, one of the kind that takes a stream of requests.
    """
    inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    asked = in_precedence(pipeline, method.name, declared(inner), method.beside)
    if not (isasyncgenfunction(inner) or iscoroutinefunction(inner)):
        inner = bridged(inner, executor, streams=bool(handler.response_streaming))

    early = before_body and not method.request_streaming
    reply = _many if isasyncgenfunction(inner) else _once
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.request_streaming or early, bool(handler.response_streaming)]
    decode = decoder(handler.request_deserializer, streams=method.request_streaming)
    guard: Handler = make(
        reply(inner, method, pipeline, asked, early),
        decode,
        _guarded(handler.response_serializer, lone=not handler.response_streaming),
    )
    return guard


def _once(inner: Any, method: Method, pipeline: Pipeline, asked: Asked, early: bool) -> Any:
    async def reply_once(request: Any, context: Any) -> Any:
        # Not ``async with``: its two ends are two coroutines more in each call.
        serving = Serving(method, pipeline, asked, request, context, early=early)
        try:
            verdict = await serving.admit()
            if verdict is not PROCEED:
                reply = await serving.answer(verdict)
            elif serving.admission.capture:
                reply = await serving.keep(inner)
            else:
                reply = await inner(serving.request, serving.context)
        except Refused as refused:
            reply = await serving.answer_late(refused.verdict)
        except BaseException as error:
            await serving.fail(error)
            raise
        if serving.is_unsettled():
            await serving.settle()
        return reply

    return reply_once


def _many(inner: Any, method: Method, pipeline: Pipeline, asked: Asked, early: bool) -> Any:
    async def reply_many(request: Any, context: Any) -> Any:
        async with (
            Serving(method, pipeline, asked, request, context, early=early) as serving,
            aclosing(inner(serving.request, serving.context)) as made,
        ):
            try:
                async for reply in made:
                    yield reply
            except Refused as refused:
                await serving.answer(refused.verdict)

    return reply_many


def _guarded(serializer: Any, *, lone: bool) -> Any:
    """Return what grpc shall encode replies with, or their stored bytes; ``lone`` where there is but one."""

    def serialize(message: Any) -> bytes:
        serving = carried.get()
        if not isinstance(serving, Serving):
            return bytes_of(message, serializer)
        if serving.stored is not None and serving.stored[0] is message:
            return serving.stored[1]
        try:
            return bytes_of(message, serializer)
        except Exception as error:
            return serving.fail_to_serialize(error, lone=lone)

    return serialize
