"""Floor 4: the registered names of an application's routes, so that nothing is ever counted by a caller's own URL."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, WebSocketRoute, compile_path
from starlette.types import Scope

from resilience.call import UNMATCHED
from resilience.decorators import is_bypassed
from resilience.errors import ConfigurationError

_WEBSOCKET = "WEBSOCKET"
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


def inner_path(scope: Scope) -> str:
    """Return the path below ``root_path``, which a server may or may not have put in front. Source: ASGI 2.4, HTTP."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


class RouteTable:
    """Tells the operation of a scope: ``"POST /orders/{id}"`` with every prefix, or ``UNMATCHED``.

    Built once from the application's routes, included routers and mounts among them, first match first, as the
    router itself does. HEAD counts as the GET that answers it; a WebSocket route is ``"WEBSOCKET /rooms"``.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        # By kind of scope, so that no method of a request can pose as a handshake.
        self._static: dict[tuple[str, str, str], str] = {}
        self._patterns: list[tuple[str, re.Pattern[str], dict[str, str]]] = []
        self.operations: set[str] = set()
        self._bypassed: list[str] = []
        for kind, path, methods, endpoint in _walk(routes, ""):
            if is_bypassed(endpoint):
                self._bypassed.append(path)
            pattern, template, convertors = compile_path(path)
            names = {method: f"{_counted_as(method, methods)} {template}" for method in methods}
            self.operations.update(names.values())
            if convertors:
                self._patterns.append((kind, pattern, names))
                continue
            for method, name in names.items():
                # A path that an earlier pattern answers too is that pattern's.
                if not self._by_pattern(kind, method, template):
                    self._static.setdefault((kind, method, template), name)

    def operation(self, scope: Scope) -> str:
        """Return the registered name that ``scope`` is routed to."""
        kind: str = scope["type"]
        method: str = scope["method"] if kind == "http" else _WEBSOCKET
        path = inner_path(scope)
        return self._static.get((kind, method, path)) or self._by_pattern(kind, method, path) or UNMATCHED

    def _by_pattern(self, kind: str, method: str, path: str) -> str | None:
        for its_kind, pattern, names in self._patterns:
            if its_kind == kind and method in names and pattern.match(path):
                return names[method]
        return None

    def verify(self, named: Iterable[str]) -> None:
        """Check that each HTTP operation a policy names is a route, and that no decorator is in vain.

        Raises:
            ConfigurationError: one is not; a limit that matches nothing would protect nothing.
        """
        if self._bypassed:
            raise ConfigurationError(
                f"The decorators above the route of {', '.join(self._bypassed)} are never asked: the route has kept "
                "the function below them. Put @rate_limit and @idempotent below @app.get, @router.post and the like."
            )
        missing = sorted(name for name in named if not name.startswith("/") and name not in self.operations)
        if missing:
            known = ", ".join(sorted(self.operations)) or "none"
            raise ConfigurationError(
                f"Policies name operations that are no route: {', '.join(missing)}. Routes: {known}."
            )


def _walk(routes: Sequence[BaseRoute], prefix: str) -> Iterator[tuple[str, str, frozenset[str], Any]]:
    """Yield the kind of scope, the path, the methods and the endpoint of every route."""
    for route in iter_route_contexts(routes):
        path = route.path
        if path is None:
            continue
        inner: Any = getattr(route.route, "routes", None)
        if inner:
            yield from _walk(inner, prefix + path)
        elif isinstance(route.original_route, WebSocketRoute):
            yield "websocket", prefix + path, frozenset({_WEBSOCKET}), route.endpoint
        elif route.endpoint is not None:
            # An endpoint class answers what it has methods for, any other application whatever comes.
            own = {method for method in _METHODS if hasattr(route.endpoint, method.lower())}
            own |= {"HEAD"} if "GET" in own else set()
            yield "http", prefix + path, frozenset(route.methods or own or _METHODS), route.endpoint


def _counted_as(method: str, methods: frozenset[str]) -> str:
    return "GET" if method == "HEAD" and "GET" in methods else method
