"""Floor 4: the outer stage. Opens the admission, and writes its metadata on whatever leaves, errors included."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_middleware.call import HttpCall
from http_middleware.client_address import ClientAddress
from http_middleware.core import ADMISSION, refuse
from http_middleware.health import is_probe, render_health
from http_middleware.render import render_error, with_metadata
from http_middleware.routes import RouteTable
from resilience import wire
from resilience.admission import Admission
from resilience.errors import ConfigurationError
from resilience.health import HealthChecker
from resilience.pipeline import Pipeline
from resilience.policies.request_context import RequestContextPolicy
from resilience.stores.memory import MemoryStore
from resilience.verdict import PROCEED, Outcome, Reject

_LEAVING = frozenset({"draining", "stopped"})
_SERVED = frozenset({"http", "websocket"})
_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class EdgeMiddleware:
    """The outer stage, for all the pipelines of one application. The first that is put in leads.

    The leader opens the admission: its store is where decorators count, its ``identify`` names the callers. A pipeline
    that the application made itself leads before one of a ready-made middleware, and that before one without a store.

    Args:
        app: the application inside, its error handler included.
        owner: the application whose stack this is; None where it stands around any other.
    """

    def __init__(self, app: ASGIApp, owner: Starlette | None = None) -> None:
        self.app = app
        self.routes: RouteTable | None = None
        """Names the operations of scopes; None until what policies name is checked."""
        self._owner = owner
        self._given: RouteTable | None = None
        self._pipelines: list[tuple[bool, Pipeline]] = []
        self._lead: Pipeline
        self._limited: tuple[Pipeline, ...] = ()
        self._health: HealthChecker | None = None
        self._address: Callable[[Scope], str | None] | None = None

    def join(
        self,
        pipeline: Pipeline,
        *,
        leads: bool = True,
        health: HealthChecker | None = None,
        routes: RouteTable | None = None,
        address: ClientAddress | None = None,
    ) -> None:
        """Serve another pipeline, too. Of what else is given for several, the first counts.

        Args:
            pipeline: its policies of the core are the core's business.
            leads: whether it leads before those of which this is not said.
            health: answers ``/health`` and below.
            routes: for policies that name operations; None finds them in the owner, else in ``scope["app"]``.
            address: finds the caller's address.
        """
        if self._health is None:
            self._health = health
        if self._given is None:
            self._given = routes
        if self._address is None and address is not None:
            self._address = address.peer
        if all(known is not pipeline for _, known in self._pipelines):
            self._pipelines.append((leads, pipeline))
            self._lead = max(self._pipelines, key=_rank)[1]
            self._limited = tuple(known for _, known in self._pipelines if _beyond_context(known))
            self.routes = None  # to be held against what this one names

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one connection; anything but ``http``, ``websocket`` and the owner's lifespan passes untouched."""
        if scope["type"] == "lifespan":
            return self.start(self.app, scope, receive, send)
        return self.serve(self.app, scope, receive, send)

    async def start(self, inner: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the lifespan of ``inner``, unless a policy names a route that isn't there: that stops the start."""
        if self._owner is not None and self.routes is None:
            try:
                self._table(self._owner)
            except ConfigurationError as error:
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
        await inner(scope, receive, send)

    def serve(
        self, inner: ASGIApp, scope: Scope, receive: Receive, send: Send, *, answers_errors: bool = False
    ) -> Awaitable[None]:
        """Serve one connection with ``inner``.

        Args:
            answers_errors: answer as Starlette's error handler would, since that stands where no ids reach it.

        Raises:
            ConfigurationError: a policy names a route that isn't there.
        """
        if scope["type"] not in _SERVED:
            return inner(scope, receive, send)
        routes = self.routes
        if routes is None:
            routes = self.routes = self._table(self._owner or scope.get("app"))
        if self._health is not None:
            if self._health.phase in _LEAVING:
                send = _parting(scope, send)
            if "/health" in scope["path"] and is_probe(scope):
                return render_health(self._health, scope, send)
        if ADMISSION in scope:
            return self._serve_inside(inner, routes, scope, receive, send)
        return self._open(inner, routes, scope, receive, send, answers_errors)

    async def _open(
        self,
        inner: ASGIApp,
        routes: RouteTable,
        scope: Scope,
        receive: Receive,
        send: Send,
        answers_errors: bool,
    ) -> None:
        call = HttpCall(scope, self, routes, self._address)
        admission = self._lead.admit(call)

        def send_with_metadata(message: Message) -> Awaitable[None]:
            if message["type"] in _STARTS:
                call.status = message.get("status", 101)
                message = dict(message, headers=with_metadata(message.get("headers", ()), admission.metadata))
            return send(message)

        scope[ADMISSION] = admission
        admission.enter()
        try:
            await admission.admit(self._lead.edge)
            if self._limited:
                admission.asked += (self._lead.edge,)
                await self._ask(admission)
            if admission.verdict is PROCEED:
                await inner(scope, receive, send_with_metadata)
            else:
                await refuse(admission.verdict, admission, scope, send_with_metadata)
        except BaseException as error:
            if answers_errors or "app" not in scope:
                # Else the error handler further out has the word, which may be the application's own.
                await _answer(error, call, scope, receive, send_with_metadata)
            await admission.leave(type(error))
            raise
        finally:
            # Else a server whose receive knows the scope leaves a cycle for each request, and full collections
            # that stop the loop for tens of milliseconds.
            del scope[ADMISSION]
        if admission.hooked:
            await _settle(admission, call)
        else:
            admission.close()

    async def _serve_inside(
        self, inner: ASGIApp, routes: RouteTable, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve a connection whose call another of us, further out, has opened: a mounted application names its own."""
        admission: Admission = scope[ADMISSION]
        call: HttpCall = admission.call  # type: ignore[assignment] # an edge has opened it
        call.edge, call.routes = self, routes
        await self._ask(admission)
        if isinstance(admission.verdict, Reject):
            await refuse(admission.verdict, admission, scope, send)
        else:
            await inner(scope, receive, send)

    async def _ask(self, admission: Admission) -> None:
        """Ask what pipelines have at the edge beyond the leader's, and beyond those of another edge further out."""
        for pipeline in self._limited:
            if not isinstance(admission.verdict, Reject) and all(one is not pipeline.edge for one in admission.asked):
                admission.asked += (pipeline.edge,)
                await admission.admit(_beyond_context(pipeline))

    def _table(self, app: Any) -> RouteTable:
        routes = self._given or RouteTable(getattr(app, "routes", ()))
        routes.verify(frozenset().union(*(pipeline.operations() for _, pipeline in self._pipelines)))
        return routes


async def _answer(error: BaseException, call: HttpCall, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request whose handler raised, if nobody has."""
    if call.status or call.streaming or not isinstance(error, Exception):
        return
    if "app" not in scope:
        await render_error(send)
    else:
        await PlainTextResponse("Internal Server Error", 500)(scope, receive, send)


async def _settle(admission: Admission, call: HttpCall) -> None:
    if not call.streaming and not isinstance(admission.verdict, Reject):
        await admission.settle(Outcome("completed" if wire.is_final_http(call.status) else "failed"))
    await admission.leave()


def _parting(scope: Scope, send: Send) -> Send:
    """Return a ``send`` that asks for another connection: this one will soon close, perhaps under the next request.

    Source: RFC 9112, 9.6; RFC 9113, 8.2.2: HTTP/2 has GOAWAY instead, which is the server's business.
    """
    if scope["type"] != "http" or scope.get("http_version", "1.1") not in ("1.0", "1.1"):
        return send

    async def send_parting(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": with_metadata(message.get("headers", ()), [("connection", "close")])}
        await send(message)

    return send_parting


def _rank(known: tuple[bool, Pipeline]) -> tuple[bool, bool]:
    leads, pipeline = known
    return leads, not isinstance(pipeline.store, MemoryStore)


def _beyond_context(pipeline: Pipeline) -> list[Any]:
    return [policy for policy in pipeline.edge if not isinstance(policy, RequestContextPolicy)]
