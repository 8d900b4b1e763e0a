"""Floor 4: wrappers that keep each handler's own style: a generator stays a generator, a coroutine a coroutine.

Outer interceptors rely on it.
"""

from concurrent.futures import Executor
from contextlib import aclosing
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Any

import grpc

from grpc_interceptors.bridge import bridged
from grpc_interceptors.malformed import decoder
from grpc_interceptors.method import Handler, Method
from grpc_interceptors.precedence import in_precedence
from grpc_interceptors.serving import Serving, guarded
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

    async def reply_once(request: Any, context: Any) -> Any:
        async with Serving(method, pipeline, asked, request, context, early=early) as serving:
            admission = serving.admission
            if admission.verdict is not PROCEED:
                return await serving.answer(admission.verdict)
            try:
                if admission.capture:
                    return await serving.keep(inner)
                return await inner(serving.request, serving.context)
            except Refused as refused:
                return await serving.answer(refused.verdict)

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

    replies: Any = reply_many if isasyncgenfunction(inner) else reply_once
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.request_streaming or early, bool(handler.response_streaming)]
    decode = decoder(handler.request_deserializer, streams=method.request_streaming)
    guard: Handler = make(replies, decode, guarded(handler.response_serializer, lone=not handler.response_streaming))
    return guard
