"""Floor 4: from an ASGI scope to a call. Reads headers as they came, when they are asked for."""

from collections.abc import Callable, Mapping, Sequence

from starlette.types import Message, Receive, Scope

from http_middleware.body import Body
from http_middleware.routes import RouteTable
from resilience import wire
from resilience.call import Call
from resilience.policies.idempotency import MAX_PAYLOAD

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # Source: RFC 9110, 9.2.1.
_SENT = {name.encode(): name for name in wire.SENT}


class HeaderMetadata:
    """Headers as metadata. Of a header that is sent twice, the first line counts."""

    __slots__ = ("_headers", "sent")

    def __init__(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._headers = headers
        self.sent: Mapping[str, str] = {
            _SENT[name]: value.decode("latin-1") for name, value in reversed(headers) if name in _SENT
        }
        """The first value of each name that nearly every call is asked for."""

    def get(self, name: str) -> str | None:
        """Return the first value sent under ``name``, or None."""
        if name in wire.SENT:
            return self.sent.get(name)
        wanted = name.encode()
        for key, value in self._headers:
            if key == wanted:
                return value.decode("latin-1")
        return None

    def get_all(self, name: str) -> list[str]:
        """Return every value sent under ``name``, in order."""
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._headers if key == wanted]


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


class HttpCall(Call):
    """One request or handshake. What nobody asks for is not worked out.

    Args:
        scope: an ``http`` or ``websocket`` scope.
        edge: through which the call has come; that of a mounted application takes its place.
        routes: name the operation of a scope; the edge's own.
        address: finds the caller's address; None takes the other end of the connection.
    """

    protocol = "http"
    status = 0
    """Of the reply that is leaving; 101 is a handshake that was accepted; 0 before it leaves."""
    receive: Receive = staticmethod(_no_body)
    """Where the body comes from; set at the core. There is none before it, nor in a handshake."""
    answered = False
    """Whether the handler's reply has begun to leave the core."""
    located = False
    """Whether a core has named the call."""
    _body: Body | None = None
    _path: str | None = None
    _root = ""
    _named: str | None = None

    def __init__(
        self,
        scope: Scope,
        edge: object,
        routes: RouteTable,
        address: Callable[[Scope], str | None] | None = None,
    ) -> None:
        self.edge = edge
        self.routes = routes
        self._scope = scope
        self.metadata = HeaderMetadata(scope["headers"])
        if address is not None:
            self.peer = address(scope)
        elif client := scope.get("client"):
            self.peer = client[0]
        if scope["type"] == "websocket":
            self.streaming = True
        elif scope["method"] in _SAFE:
            self.safe = True

    def locate(self, scope: Scope) -> None:
        """Name the call by the scope as it is now: a middleware may have rewritten the path, and a mount will."""
        self.located = True
        self._named = None
        self._scope = scope
        self._path = scope["path"]
        self._root = scope.get("root_path", "")

    @property
    def operation(self) -> str:
        """The registered name of the route, found on first use."""
        if self._named is None:
            scope = self._scope
            if self._path is not None:
                scope = {**scope, "path": self._path, "root_path": self._root}
            self._named = self.routes.operation(scope)
        return self._named

    def resource(self) -> str:
        """Return the path and the query."""
        query: bytes = self._scope.get("query_string", b"")
        return f"{self._scope['path'] if self._path is None else self._path}?{query.decode('latin-1')}"

    async def payload(self, limit: int) -> bytes:
        """Read the body ahead of the application. See ``Body.read``."""
        if self._body is None:
            self._body = Body(self.metadata, self.receive)
        return await self._body.read(limit)

    def receiver(self) -> Receive:
        """Return what the application reads its body from: where a policy may ask for it later, what passes is kept."""
        keyed = not self.safe and wire.IDEMPOTENCY_KEY in self.metadata.sent
        if self._body is None:
            if not keyed:
                return self.receive
            self._body = Body(self.metadata, self.receive)
        return self._body.receiver(MAX_PAYLOAD if keyed else 0)
