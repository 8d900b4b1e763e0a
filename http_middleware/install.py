"""Floor 4: put both stages of the door in their places, in one line."""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware.middleware import CoreMiddleware, ResilienceMiddleware
from http_middleware.routes import RouteTable
from resilience.errors import ConfigurationError
from resilience.health import HealthChecker
from resilience.pipeline import Pipeline


def install(app: Starlette, pipeline: Pipeline, *, health: HealthChecker | None = None) -> None:
    """Guard a FastAPI or Starlette application.

    The edge goes outside of the application's whole stack, so that even an unhandled 500 carries ids; the core goes
    inside of every middleware, so that limits and keys know the caller that authentication found. Middleware that is
    added later still lands between the two.

    Args:
        app: not yet serving.
        pipeline: the policies.
        health: answers ``/health`` and below.

    Raises:
        ConfigurationError: the application serves already.
    """
    if app.middleware_stack is not None:
        raise ConfigurationError("Call install() before the application serves its first request.")
    app.user_middleware.append(Middleware(CoreMiddleware, pipeline=pipeline))
    build = app.build_middleware_stack

    def build_guarded() -> ASGIApp:
        return _Installed(build(), app, pipeline, health)

    app.build_middleware_stack = build_guarded  # type: ignore[method-assign] # The only slot outside of the error handler.


class _Installed:
    """The edge, after a look at the routes: a policy for a route that isn't there stops the start."""

    def __init__(self, stack: ASGIApp, app: Starlette, pipeline: Pipeline, health: HealthChecker | None) -> None:
        self.app = stack
        self._routes = RouteTable(app.routes)
        self._pipeline = pipeline
        self._edge = ResilienceMiddleware(stack, pipeline, health=health, routes=self._routes, core=False)
        self._verified = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._verified:
            try:
                self._routes.verify(self._pipeline.operations())
            except ConfigurationError as error:
                if scope["type"] != "lifespan":
                    raise
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            self._verified = True
        await self._edge(scope, receive, send)
