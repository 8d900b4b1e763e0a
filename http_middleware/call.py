"""Floor 4: from an ASGI scope to a call. Reads headers as they came; reads a body only where a policy asks."""

from collections.abc import Callable, Sequence
from functools import partial

from starlette.types import Message, Receive, Scope

from resilience.call import Call, Metadata
from resilience.errors import PayloadTooLargeError

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # Source: RFC 9110, 9.2.1.


class ClientGoneError(Exception):
    """The client hung up before its request was whole: there is nobody to answer."""


class HeaderMetadata:
    """Headers as metadata. Of a header that is sent twice, the first line counts."""

    __slots__ = ("_first", "_headers")

    def __init__(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._headers = headers
        self._first: dict[bytes, bytes] | None = None

    def get(self, name: str) -> str | None:
        """Return the first value sent under ``name``, or None."""
        if self._first is None:
            self._first = dict(reversed(self._headers))
        value = self._first.get(name.encode())
        return None if value is None else value.decode("latin-1")

    def get_all(self, name: str) -> list[str]:
        """Return every value sent under ``name``, in order."""
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._headers if key == wanted]


class Body:
    """A request's body, read ahead of the application, which then gets it as if nothing had happened."""

    __slots__ = ("_ahead", "_metadata", "_receive")

    def __init__(self, metadata: Metadata, receive: Receive) -> None:
        self._metadata = metadata
        self._receive = receive
        self._ahead: list[Message] = []

    async def read(self, limit: int) -> bytes:
        """Return the whole body.

        Raises:
            PayloadTooLargeError: it is, or says it is, over ``limit`` bytes.
            ClientGoneError: it ended before it was whole.
        """
        declared = self._metadata.get("content-length") or ""
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            raise PayloadTooLargeError(limit)
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise PayloadTooLargeError(limit)
            chunks.append(chunk)
            more = message.get("more_body", False)
        body = b"".join(chunks)
        self._ahead.append({"type": "http.request", "body": body, "more_body": False})
        return body

    def receiver(self) -> Receive:
        """Return what the application reads from: nothing in between where nothing was read ahead."""
        return self._replay if self._ahead else self._receive

    async def _replay(self) -> Message:
        return self._ahead.pop() if self._ahead else await self._receive()


def inner_path(scope: Scope) -> str:
    """Return the path below ``root_path``, which a server may or may not have put in front. Source: ASGI 2.4, HTTP."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def call_from_scope(scope: Scope, operation: Callable[[Scope], str]) -> Call:
    """Build the call of an ``http`` or ``websocket`` scope; the payload is set where the body can be read."""
    client = scope.get("client")
    websocket = scope["type"] == "websocket"
    return Call(
        "http",
        partial(operation, scope),
        HeaderMetadata(scope["headers"]),
        peer=client[0] if client else None,
        streaming=websocket,
        safe=not websocket and scope["method"] in _SAFE,
        resource=partial(_resource, scope),
    )


def rename_call(call: Call, scope: Scope, operation: Callable[[Scope], str]) -> None:
    """Have a call named by the scope as it is further in, where a middleware may have rewritten the path."""
    call.rename(partial(operation, scope), partial(_resource, scope))


def _resource(scope: Scope) -> str:
    query: bytes = scope.get("query_string", b"")
    return f"{scope['path']}?{query.decode('latin-1')}"
