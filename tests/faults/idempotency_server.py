"""The service that is broken on purpose: ``python -m tests.faults.idempotency_server OPTIONS``, in JSON.

One process with both doors and a store in Redis. Each operation is offered over HTTP and over gRPC, under a policy of
its own. What a handler does, the request's ``x-behave`` says; no fingerprint has that in it, so a retry may behave
otherwise. Prints the port of each door.
"""

import asyncio
import json
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any

import grpc
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from google.protobuf.struct_pb2 import Struct
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grpc_interceptors import ResilienceInterceptor
from http_middleware import install
from http_middleware.server import UvicornServer
from resilience import Admission, Call, HealthChecker, IdempotencyPolicy, Pipeline, Verdict, running_operation
from resilience.codecs import JsonCodec
from resilience.lifecycle import run
from resilience.shared_operation import operation
from tests.faults.idempotency_ledger import Pen
from tests.faults.idempotency_lies import LyingStore

SERVICE = "faults.Orders"
OPERATIONS = ("reexecute", "refuse", "patient", "short", "tombstone", "stream", "shared")
MAX_REPLY = 4096
CHUNKS = 3
COOKIES = (("set-cookie", "a=1"), ("set-cookie", "b=2"))
HEADERS = (("location", "/orders/1"), ("link", "</a>; rel=next"), ("link", "</b>; rel=last"))
TRAILERS = (("x-order", "one"), ("x-order", "two"), ("x-order-bin", b"\x00\xff"))
_LAG, _LOOK = 0.2, 0.1  # Seconds by which the loop may be late, and between two looks at it.


class ByOperation:
    """A policy that hands each call to the policy of its operation."""

    def __init__(self, policies: Mapping[str, IdempotencyPolicy]) -> None:
        self._policies = policies

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Ask the policy that has the operation's name."""
        return await self._policies[call.operation.rpartition("/")[2]].admit(call, admission)


class Behaviour:
    """What a request wants to be done with it."""

    def __init__(self, pen: Pen, get: Callable[[str], str | None]) -> None:
        told = json.loads(get("x-behave") or "{}")
        self._pen = pen
        self._key = f"{get('x-api-key')}/{get('idempotency-key')}"
        self._op: str = told.get("op", "")
        self._hold: list[str] = told.get("hold", [])
        self.seconds: float = told.get("seconds", 0.0)
        self.end: str = told.get("end", "ok")
        self.announced: bool = told.get("announced", False)
        self._run = uuid.uuid4().hex
        self._epoch = 0

    async def tell(self, event: str) -> None:
        """Tell the ledger of a step; stand there if the request says so."""
        held = event in self._hold
        await self._pen.tell(event, self._key, run=self._run, epoch=self._epoch, op=self._op, held=held)

    async def outer(self, event: str) -> None:
        """Tell of a step outside of our own interceptors, if somebody wants to know."""
        if event in self._hold or (event == "arrived" and self.announced):
            await self.tell(event)

    async def work(self) -> dict[str, Any]:
        """Have the side effect, and return what is answered."""
        running = running_operation()
        self._epoch = running.epoch if running is not None else 0
        if "before" in self._hold:
            await self.tell("before")
        await self.tell("run")
        await asyncio.sleep(self.seconds)
        await self.tell("end")
        if self.end == "raise":
            raise RuntimeError("The handler failed, as it was asked to")
        return {"run": self._run, "epoch": self._epoch}

    async def place(self, where: str, order: Mapping[str, Any]) -> dict[str, Any]:
        """Work, under the operation that a request came for."""
        if where.endswith("shared"):
            return await self._place_shared(str(order["item"]), float(order["amount"]))
        return await self.work()

    @operation("shared", JsonCodec(dict[str, Any]))
    async def _place_shared(self, item: str, amount: float) -> dict[str, Any]:
        """Work for both doors: a retry at the other one is told the same."""
        return {**await self.work(), "item": item, "amount": amount}


# -- HTTP


def build_app(pipeline: Pipeline, pen: Pen) -> ASGIApp:
    """Return the guarded application."""
    app = FastAPI()

    async def order(request: Request) -> Response:
        behaviour = Behaviour(pen, request.headers.get)
        body = json.dumps(await behaviour.place(request.url.path, await request.json())).encode()
        if behaviour.end in ("stream", "long"):
            filling = b" " * (MAX_REPLY if behaviour.end == "long" else 1)
            return StreamingResponse(_chunks(body, filling), 201, media_type="application/json")
        status = {"unavailable": 503, "missing": 404}.get(behaviour.end, 201)
        task = BackgroundTask(behaviour.tell, "background") if behaviour.end == "background" else None
        response = Response(body, status, media_type="application/json", background=task)
        if behaviour.end == "headers":
            for name, value in (*COOKIES, *HEADERS):
                response.headers.append(name, value)
        return response

    for name in OPERATIONS:
        app.add_api_route(f"/{name}", order, methods=["POST"])
    install(app, pipeline)
    return _Outside(app, pen)


async def _chunks(body: bytes, filling: bytes) -> AsyncIterator[bytes]:
    for _ in range(CHUNKS):
        yield filling
    yield body


class _Outside:
    """Stands between the server and the application: sees a request first, and its reply's last byte last."""

    def __init__(self, app: ASGIApp, pen: Pen) -> None:
        self._app = app
        self._pen = pen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        behaviour = Behaviour(self._pen, Request(scope).headers.get)
        await behaviour.outer("arrived")

        async def hold(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await behaviour.outer("after")
            await send(message)

        await self._app(scope, receive, hold)


# -- gRPC


def build_server(pipeline: Pipeline, pen: Pen) -> grpc.aio.Server:
    """Return the guarded server."""
    left: set[asyncio.Task[None]] = set()  # what handlers leave behind

    async def order(where: str, request: Struct, context: Any) -> Struct:
        behaviour = Behaviour(pen, dict(context.invocation_metadata()).get)
        reply = Struct()
        reply.update(await behaviour.place(where, dict(request.items())))
        if behaviour.end in ("unavailable", "missing"):
            code = grpc.StatusCode.UNAVAILABLE if behaviour.end == "unavailable" else grpc.StatusCode.NOT_FOUND
            await context.abort(code, reply["run"])
        if behaviour.end == "headers":
            context.set_trailing_metadata(TRAILERS)
        if behaviour.end == "background":
            left.add(task := asyncio.create_task(behaviour.tell("background")))
            task.add_done_callback(left.discard)
        return reply

    async def orders(_request: Struct, context: Any) -> AsyncIterator[Struct]:
        reply = Struct()
        reply.update(await Behaviour(pen, dict(context.invocation_metadata()).get).work())
        yield reply

    def lone(name: str) -> Any:
        return grpc.unary_unary_rpc_method_handler(partial(order, name), Struct.FromString, Struct.SerializeToString)

    many = grpc.unary_stream_rpc_method_handler(orders, Struct.FromString, Struct.SerializeToString)
    server = grpc.aio.server(interceptors=[_Outer(pen), ResilienceInterceptor(pipeline)])
    handlers = {name: many if name == "stream" else lone(name) for name in OPERATIONS}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    return server


class _Outer(grpc.aio.ServerInterceptor):
    """Sees a call before our interceptor does, and its reply after that has stored it."""

    def __init__(self, pen: Pen) -> None:
        self._pen = pen

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.response_streaming:
            return handler
        behaviour = Behaviour(self._pen, dict(handler_call_details.invocation_metadata).get)

        async def around(request: Any, context: Any) -> Any:
            await behaviour.outer("arrived")
            reply = await handler.unary_unary(request, context)
            await behaviour.outer("after")
            return reply

        return grpc.unary_unary_rpc_method_handler(around, handler.request_deserializer, handler.response_serializer)


async def watch_lags(pen: Pen) -> None:
    """Tell of each time at which this process could not run, whatever kept it."""
    while True:
        before = monotonic()
        await asyncio.sleep(_LOOK)
        late = monotonic() - before
        if late > _LOOK + _LAG:
            await pen.tell("lag", seconds=late)


async def main(options: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    pen = Pen(options["ledger"], options["name"])
    store = LyingStore(options["redis"])
    store.lies = options.get("lies", "")
    lease: float = options["lease"]
    known: dict[str, dict[str, Any]] = {name: {"lease": lease, "max_reply": MAX_REPLY} for name in OPERATIONS}
    known["patient"]["lease"] = 30.0
    known["shared"]["operation"] = "shared"
    known["refuse"]["takeover"] = "refuse"
    known["short"]["ttl"] = known["tombstone"]["ttl"] = lease
    known["tombstone"]["tombstone"] = 60.0
    policies = {name: IdempotencyPolicy(store, **told) for name, told in known.items()}
    pipeline = Pipeline([ByOperation(policies)], store=store)
    http = UvicornServer(build_app(pipeline, pen), port=0, log_config=None)
    server = build_server(pipeline, pen)
    port = server.add_insecure_port("127.0.0.1:0")
    lags = asyncio.create_task(watch_lags(pen))
    await run(
        *(server, http),
        checker=HealthChecker("1", "faults", phase="starting"),
        pipeline=pipeline,
        delay=0,
        grace=5,
        on_ready=lambda: print(http.port, port, flush=True),
    )
    lags.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(main(json.loads(sys.argv[1])))
