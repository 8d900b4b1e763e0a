"""Floor 4: the HTTP door. Pure ASGI: no request object, no task group, no thread between a server and its app.

Two stages on one admission. The *edge* opens it, outside of everything, and writes its metadata on whatever leaves,
unhandled errors included. The *core* asks for limits and keys where the caller is known: right before the router.
"""

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware.client_address import ClientAddress
from http_middleware.core import ADMISSION, CoreMiddleware
from http_middleware.edge import EdgeMiddleware
from http_middleware.hoist import answers_errors, chain, edge_of, join_core, owner_of
from http_middleware.openapi import document
from http_middleware.routes import RouteTable
from resilience.health import HealthChecker
from resilience.pipeline import Pipeline


class ResilienceMiddleware:
    """Guards an ASGI application with a pipeline.

    Added to a FastAPI or Starlette application with ``add_middleware``, it puts each stage in its place when it first
    hears of the application, at its start: the edge outside of the whole stack, the core inside of all of it, whatever
    was added before or after. From then on nothing happens here. (Without a lifespan that is at the first request,
    which meets the edge only here.) Around any other ASGI application both stages stand where this stands.

    Args:
        app: the application inside.
        pipeline: the policies; by default, ids alone.
        health: answers ``/health`` and below; None leaves these paths to the application.
        routes: the application's routes, for policies that name operations; None finds them in ``scope["app"]``.
        core: False where ``CoreMiddleware`` stands further in.
        address: finds the caller's address where proxies stand in front; None takes the connection's.
    """

    def __init__(
        self,
        app: ASGIApp,
        pipeline: Pipeline | None = None,
        *,
        health: HealthChecker | None = None,
        routes: RouteTable | None = None,
        core: bool = True,
        address: ClientAddress | None = None,
    ) -> None:
        self.app = app
        self._pipeline = pipeline or Pipeline()
        self._leads = pipeline is not None
        self._health = health
        self._routes = routes
        self._core = core
        self._address = address
        self.edge: EdgeMiddleware | None = None
        """The outer stage that serves this one's connections; None before the first."""
        self._answers_errors = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but ``http`` and ``websocket`` passes untouched."""
        edge = self.edge or self._find_place(scope)
        admission = scope.get(ADMISSION)
        if admission is not None and admission.call.edge is edge:
            await self.app(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(edge, scope, receive, send)
        else:
            await edge.serve(self.app, scope, receive, send, answers_errors=self._answers_errors)

    def place(self, owner: Starlette | None, edge: EdgeMiddleware) -> None:
        """Take part in the stages of ``owner``, or have them here where there is none."""
        self.edge = edge
        edge.join(self._pipeline, leads=self._leads, health=self._health, routes=self._routes, address=self._address)
        if owner is not None:
            self._answers_errors = answers_errors(self, owner)
        if isinstance(owner, FastAPI):
            document(owner, self._pipeline)
        if not self._core:
            return
        if owner is not None:
            join_core(self, self._pipeline)
        else:
            self.app = CoreMiddleware(self.app, self._pipeline)

    async def _live(self, edge: EdgeMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        await edge.start(self.app, scope, receive, send)

    def _find_place(self, scope: Scope) -> EdgeMiddleware:
        owner = owner_of(self, scope)
        if owner is None:
            edge = EdgeMiddleware(self.app)
            self.place(None, edge)
            return edge
        edge = edge_of(owner)
        # All that can be seen at once, so that the first request meets them all.
        for link in (self, *chain(owner.middleware_stack)):
            if isinstance(link, ResilienceMiddleware) and link.edge is None:
                link.place(owner, edge)
        return edge
