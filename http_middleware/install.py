"""Floor 4: put both stages of the door in their places, in one line."""

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from http_middleware.client_address import ClientAddress
from http_middleware.core import CoreMiddleware
from http_middleware.edge import EdgeMiddleware
from http_middleware.hoist import chain
from http_middleware.middleware import ResilienceMiddleware
from http_middleware.openapi import document
from resilience.errors import ConfigurationError
from resilience.health import HealthChecker
from resilience.pipeline import Pipeline


def install(
    app: Starlette,
    pipeline: Pipeline | None = None,
    *,
    health: HealthChecker | None = None,
    address: ClientAddress | None = None,
) -> None:
    """Guard a FastAPI or Starlette application.

    The edge goes outside of the application's whole stack, so that even an unhandled 500 carries ids; the core goes
    inside of every middleware, so that limits and keys know the caller that authentication found. Middleware that is
    added later still lands between the two. A policy for a route that isn't there stops the start.

    Args:
        app: not yet serving.
        pipeline: the policies; by default, ids alone.
        health: answers ``/health`` and below.
        address: finds the caller's address where proxies stand in front; None takes the connection's.

    Raises:
        ConfigurationError: the application serves already.
    """
    if app.middleware_stack is not None:
        raise ConfigurationError("Call install() before the application serves its first request.")
    guarded = pipeline or Pipeline()
    app.user_middleware.append(Middleware(CoreMiddleware, pipeline=guarded))
    build = app.build_middleware_stack

    def build_guarded() -> ASGIApp:
        _document(app, guarded)  # again, for an ``app.openapi`` that was replaced meanwhile
        stack = build()
        edge = EdgeMiddleware(stack, app)
        edge.join(guarded, leads=pipeline is not None, health=health, address=address)
        for link in chain(stack):
            if isinstance(link, ResilienceMiddleware):
                link.place(app, edge)
        return edge

    _document(app, guarded)
    app.build_middleware_stack = build_guarded  # type: ignore[method-assign] # The only slot outside of the error handler.


def _document(app: Starlette, pipeline: Pipeline) -> None:
    if isinstance(app, FastAPI):
        document(app, pipeline)
