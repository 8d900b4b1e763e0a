"""Floor 4: the HTTP door. Pure ASGI: no request object, no task group, no thread between a server and its app.

Two stages on one admission. The *edge* opens it, outside of everything, and writes its metadata on whatever leaves,
unhandled errors included. The *core* asks for limits and keys where the caller is known: right before the router.
"""

from collections.abc import Awaitable, Callable

import anyio.from_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_middleware.call import Body, ClientGoneError, call_from_scope, rename_call
from http_middleware.health import is_probe, render_health
from http_middleware.render import (
    kept_metadata,
    refuse_websocket,
    render_client_gone,
    render_error,
    render_reject,
    render_reply,
    with_metadata,
)
from http_middleware.routes import RouteTable
from resilience import wire
from resilience.admission import Admission, Refused
from resilience.health import HealthChecker
from resilience.pipeline import Pipeline
from resilience.policies.idempotency import MAX_PAYLOAD
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Reply, Verdict

_ADMISSION = "resilience.admission"
_OPERATION = "resilience.operation"
_SENT_BY_THE_SERVER = frozenset({"http.response.pathsend", "http.response.zerocopysend"})
_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class ResilienceMiddleware:
    """Guards an ASGI application with a pipeline.

    ``install(app, pipeline)`` is the way for FastAPI and Starlette: it puts each stage in its place. Wrapped around an
    application by hand, or added with ``add_middleware``, both stages stand where this stands.

    Args:
        app: the application inside.
        pipeline: the policies.
        health: answers ``/health`` and below; None leaves these paths to the application.
        routes: the application's routes, for policies that name operations; None finds them in ``scope["app"]``.
        core: False where ``CoreMiddleware`` stands further in.
    """

    def __init__(
        self,
        app: ASGIApp,
        pipeline: Pipeline,
        *,
        health: HealthChecker | None = None,
        routes: RouteTable | None = None,
        core: bool = True,
    ) -> None:
        self.app: ASGIApp = CoreMiddleware(app, pipeline) if core else app
        self._pipeline = pipeline
        self._health = health
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but ``http`` and ``websocket`` passes untouched."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif self._health is not None and is_probe(scope):
            await render_health(self._health, scope, send)
        elif _ADMISSION in scope:
            # Another of us, further out, has opened the call; a mounted application names its own routes.
            scope[_OPERATION] = self._operation
            await self.app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def send_with_metadata(message: Message) -> None:
            nonlocal status
            if message["type"] in _STARTS:
                status = message.get("status", 101)
                message = {**message, "headers": with_metadata(message.get("headers", ()), admission.metadata)}
            await send(message)

        scope[_OPERATION] = self._operation
        async with self._pipeline.admit(call_from_scope(scope, self._operation)) as admission:
            if isinstance(admission.verdict, Reject):
                await _refuse(admission.verdict, admission, scope, send_with_metadata)
                return
            scope[_ADMISSION] = admission
            try:
                await self.app(scope, receive, send_with_metadata)
            except Exception:
                # Within Starlette the error handler further out has the word, and may be the application's own.
                if not status and scope["type"] == "http" and "app" not in scope:
                    await render_error(send_with_metadata)
                raise
            if scope["type"] == "http" and not isinstance(admission.verdict, Reject):
                await admission.settle(Outcome("completed" if wire.is_final_http(status) else "failed"))

    def _operation(self, scope: Scope) -> str:
        if self._routes is None:
            app = scope.get("app")
            routes = RouteTable(getattr(app, "routes", ()))
            routes.verify(self._pipeline.operations())
            self._routes = routes
        return self._routes.operation(scope)


class CoreMiddleware:
    """The inner stage. Stands inside of authentication, and outside of the router and of error handlers."""

    def __init__(self, app: ASGIApp, pipeline: Pipeline) -> None:
        self.app = app
        self._policies = pipeline.core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the core policies on the admission that the edge opened."""
        admission: Admission | None = scope.get(_ADMISSION)
        if admission is None or any(asked is self._policies for asked in admission.asked):
            await self.app(scope, receive, send)
            return
        first = not admission.asked
        admission.asked.append(self._policies)
        rename_call(admission.call, scope, scope[_OPERATION])
        if scope["type"] != "http":
            verdict = await admission.admit(self._policies)
            if isinstance(verdict, Reject):
                await _refuse(verdict, admission, scope, send)
            else:
                await self.app(scope, receive, send)
            return
        if first:
            body = Body(admission.call.metadata, receive)
            admission.call.payload = body.read
        try:
            verdict = await admission.admit(self._policies)
        except ClientGoneError:
            await render_client_gone(send)
            return
        if verdict is not PROCEED:
            await _render(verdict, admission, send)
        elif first:
            keep = MAX_PAYLOAD if _may_be_keyed(admission) else 0
            await self._serve(admission, scope, body.receiver(keep), send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, admission: Admission, scope: Scope, receive: Receive, send: Send) -> None:
        admission.from_thread = _from_thread
        outgoing = _Outgoing(admission, send)
        try:
            await self.app(scope, receive, outgoing)
        except Refused:
            pass  # the verdict is the admission's
        except Exception:
            # Before the error handler further out answers: who retries on its answer must find the key free.
            if admission.capture:
                await admission.settle(Outcome("failed"))
            raise
        if admission.verdict is not PROCEED and not outgoing.started:
            await _render(admission.verdict, admission, send)


def _may_be_keyed(admission: Admission) -> bool:
    return not admission.call.safe and admission.call.metadata.get(wire.IDEMPOTENCY_KEY) is not None


def _from_thread(admit: Callable[[], Awaitable[Verdict]]) -> Verdict:
    return anyio.from_thread.run(admit)


class _Outgoing:
    """Lets a reply leave, through a recorder if by then a policy wants to see it.

    What a handler made of a refusal by one of its own policies (a mounted application's error page, say) is dropped.
    """

    __slots__ = ("_admission", "_send", "started")

    def __init__(self, admission: Admission, send: Send) -> None:
        self._admission = admission
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        if not self.started:
            if self._admission.verdict is not PROCEED:
                return
            if message["type"] == "http.response.start":
                self.started = True
                if self._admission.capture:
                    self._send = _Recorder(self._admission, self._send)
        await self._send(message)


class _Recorder:
    """Watches a reply leave, and settles the admission before its last byte does."""

    __slots__ = ("_admission", "_body", "_headers", "_send", "_status")

    def __init__(self, admission: Admission, send: Send) -> None:
        self._admission = admission
        self._send = send
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: bytearray | None = bytearray()

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self._status = message["status"]
            self._headers = list(message.get("headers", ()))
        elif kind == "http.response.body":
            self._keep(message.get("body", b""))
        elif kind in _SENT_BY_THE_SERVER:
            self._body = None
        else:
            await self._send(message)  # an announcement: the reply is still to come
            return
        if kind != "http.response.start" and not message.get("more_body", False):
            await self._settle()
        try:
            await self._send(message)
        except Exception:
            # The work is done, though nobody hears of it: a retry must not do it again.
            self._body = None
            await self._settle()
            raise

    def _keep(self, chunk: bytes) -> None:
        if self._body is not None:
            self._body += chunk
            if len(self._body) > self._admission.capture:
                self._body = None

    async def _settle(self) -> None:
        reply = None
        if self._body is not None:
            reply = Reply("http", self._status, kept_metadata(self._headers), bytes(self._body))
        final = wire.is_final_http(self._status)
        await self._admission.settle(Outcome("completed" if final else "failed", reply))


async def _render(verdict: Verdict, admission: Admission, send: Send) -> None:
    if isinstance(verdict, Replay):
        await render_reply(verdict.reply, send)
    elif isinstance(verdict, Reject):
        await render_reject(verdict, admission, send)


async def _refuse(reject: Reject, admission: Admission, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await refuse_websocket(reject, scope.get("extensions") or (), admission, send)
    else:
        await render_reject(reject, admission, send)
