"""Floor 4: from an ASGI scope to a call. Reads headers as they came, when they are asked for."""

from collections.abc import Callable, Sequence
from functools import partial

from starlette.types import Scope

from resilience import wire
from resilience.call import Call

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # Source: RFC 9110, 9.2.1.
# Of the names that are asked for in nearly every call: to encode them each time would be a fifth of a look-up.
_ENCODED = {
    name: name.encode()
    for name in (
        wire.CORRELATION_ID,
        wire.IDEMPOTENCY_KEY,
        wire.REQUEST_ID,
        wire.REQUEST_TIMEOUT,
        wire.TRACEPARENT,
        "content-length",
        "x-api-key",
    )
}


class HeaderMetadata:
    """Headers as metadata. Of a header that is sent twice, the first line counts."""

    __slots__ = ("_first", "_headers")

    def __init__(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._headers = headers
        self._first: dict[bytes, bytes] | None = None

    def get(self, name: str) -> str | None:
        """Return the first value sent under ``name``, or None."""
        first = self._first
        if first is None:
            first = self._first = dict(reversed(self._headers))
        value = first.get(_ENCODED.get(name) or name.encode())
        return None if value is None else value.decode("latin-1")

    def get_all(self, name: str) -> list[str]:
        """Return every value sent under ``name``, in order."""
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._headers if key == wanted]


def inner_path(scope: Scope) -> str:
    """Return the path below ``root_path``, which a server may or may not have put in front. Source: ASGI 2.4, HTTP."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def direct_peer(scope: Scope) -> str | None:
    """Return the address at the other end of the connection, be it a proxy's; None is a unix socket's."""
    client = scope.get("client")
    return client[0] if client else None


def call_from_scope(
    scope: Scope, operation: Callable[[Scope], str], address: Callable[[Scope], str | None] | None = None
) -> Call:
    """Build the call of an ``http`` or ``websocket`` scope; the payload is set where the body can be read.

    Args:
        operation: names the operation of a scope, when first asked for.
        address: finds the caller's address; None takes the other end of the connection.
    """
    websocket = scope["type"] == "websocket"
    return Call(
        "http",
        partial(operation, scope),
        HeaderMetadata(scope["headers"]),
        peer=(address or direct_peer)(scope),
        streaming=websocket,
        safe=not websocket and scope["method"] in _SAFE,
        resource=partial(_resource, scope),
    )


def rename_call(call: Call, scope: Scope, operation: Callable[[Scope], str]) -> None:
    """Have a call named by the scope as it is now: a middleware may have rewritten the path, and a mount will."""
    get = scope.get
    seen = {
        "type": scope["type"],
        "method": get("method"),
        "path": scope["path"],
        "root_path": get("root_path", ""),
        "query_string": get("query_string", b""),
        "app": get("app"),
    }
    call.rename(partial(operation, seen), partial(_resource, seen))


def _resource(scope: Scope) -> str:
    query: bytes = scope.get("query_string", b"")
    return f"{scope['path']}?{query.decode('latin-1')}"
