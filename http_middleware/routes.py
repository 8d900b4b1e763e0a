"""Floor 4: the registered names of an application's routes, so that nothing is ever counted by a caller's own URL."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, compile_path
from starlette.types import Scope

from resilience.call import UNMATCHED
from resilience.errors import ConfigurationError

_WEBSOCKET = frozenset({"WEBSOCKET"})


class RouteTable:
    """Tells the operation of a scope: ``"POST /orders/{id}"`` with every prefix, or ``UNMATCHED``.

    Built once from the application's routes, included routers and mounts among them, first match first, as the
    router itself does. HEAD counts as the GET that answers it.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._static: dict[tuple[str, str], str] = {}
        self._patterns: list[tuple[re.Pattern[str], frozenset[str], str]] = []
        self.operations: set[str] = set()
        for path, methods in _walk(routes, ""):
            pattern, template, convertors = compile_path(path)
            for method in methods:
                self.operations.add(f"{method} {template}")
                # A path that an earlier pattern answers too is that pattern's.
                if not convertors and not self._by_pattern(method, template):
                    self._static.setdefault((method, template), f"{method} {template}")
            if convertors:
                self._patterns.append((pattern, methods, template))

    def operation(self, scope: Scope) -> str:
        """Return the registered name that ``scope`` is routed to."""
        method: str = scope["method"] if scope["type"] == "http" else "WEBSOCKET"
        if method == "HEAD":
            method = "GET"
        path = _inner_path(scope)
        return self._static.get((method, path)) or self._by_pattern(method, path) or UNMATCHED

    def _by_pattern(self, method: str, path: str) -> str | None:
        for pattern, methods, template in self._patterns:
            if method in methods and pattern.match(path):
                return f"{method} {template}"
        return None

    def verify(self, named: Iterable[str]) -> None:
        """Check that each HTTP operation a policy names is a route.

        Raises:
            ConfigurationError: one is not; a limit that matches nothing would protect nothing.
        """
        missing = sorted(name for name in named if not name.startswith("/") and name not in self.operations)
        if missing:
            known = ", ".join(sorted(self.operations)) or "none"
            raise ConfigurationError(
                f"Policies name operations that are no route: {', '.join(missing)}. Routes: {known}."
            )


def _inner_path(scope: Scope) -> str:
    """Return the path below ``root_path``, which a server may or may not have put in front. Source: ASGI 2.4, HTTP."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def _walk(routes: Sequence[BaseRoute], prefix: str) -> Iterator[tuple[str, frozenset[str]]]:
    for route in iter_route_contexts(routes):
        path = route.path
        if path is None:
            continue
        inner: Any = getattr(route.route, "routes", None)
        if inner:
            yield from _walk(inner, prefix + path)
        elif route.endpoint is not None:
            yield prefix + path, frozenset(route.methods or _WEBSOCKET)
