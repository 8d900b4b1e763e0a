"""Floor 4: where in an application's stack the two stages belong, and how they get there. Serves no request.

``add_middleware`` puts a class wherever it was added: outside of some middleware, inside of others, and never outside
of Starlette's error handler. A stack is a chain of ``.app`` attributes, which may end early at somebody else's class.
"""

from collections.abc import Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Scope

from http_middleware.core import CoreMiddleware
from http_middleware.edge import EdgeMiddleware
from resilience.pipeline import Pipeline

_FRAMEWORKS = frozenset({"fastapi", "http_middleware", "starlette"})


def chain(app: Any) -> Iterator[Any]:
    """Yield an ASGI application and what stands inside of it, as far as that can be seen."""
    seen: set[int] = set()
    while app is not None and id(app) not in seen:
        yield app
        seen.add(id(app))
        app = getattr(app, "app", None)


def owner_of(member: ASGIApp, scope: Scope) -> Starlette | None:
    """Return the application in whose own stack ``member`` stands: not one that mounts it, nor one it is put around."""
    app = scope.get("app")
    if not isinstance(app, Starlette) or app.middleware_stack is None:
        return None
    inside = any(link is app.router for link in chain(member))
    return app if inside or any(link is member for link in chain(app.middleware_stack)) else None


def edge_of(app: Starlette) -> EdgeMiddleware:
    """Return the edge of an application that serves; puts one outside of its whole stack where there is none."""
    for link in chain(app.middleware_stack):
        if isinstance(link, EdgeMiddleware):
            return link
    assert app.middleware_stack is not None  # noqa: S101 - it serves
    edge = app.middleware_stack = EdgeMiddleware(app.middleware_stack, app)
    return edge


def join_core(member: Any, pipeline: Pipeline) -> None:
    """Have a pipeline's core asked right before the router, or as near to it as can be seen from ``member``."""
    outside = holder = member
    for link in chain(member.app):
        if isinstance(link, CoreMiddleware):
            link.join(pipeline)
            return
        if isinstance(link, ExceptionMiddleware):
            outside = holder
            break
        outside, holder = holder, link
    try:
        outside.app = CoreMiddleware(outside.app, pipeline)
    except AttributeError:
        member.app = CoreMiddleware(member.app, pipeline)  # the other one is read-only


def answers_errors(member: Any, app: Starlette) -> bool:
    """Tell whether an exception that leaves ``member`` is sure to get Starlette's plain answer further out.

    That is where the application has no handler of its own for it, and nobody outside may make something else of it.
    """
    for link in chain(app.middleware_stack):
        if link is member:
            return True
        if isinstance(link, ServerErrorMiddleware) and (link.handler is not None or link.debug):
            return False
        if isinstance(link, BaseHTTPMiddleware) or type(link).__module__.partition(".")[0] not in _FRAMEWORKS:
            return False
    return False
