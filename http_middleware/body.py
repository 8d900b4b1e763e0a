"""Floor 4: a request's body, read ahead of the application only where a policy asks for it."""

from starlette.types import Message, Receive

from resilience.call import Metadata
from resilience.errors import PayloadTooLargeError


class ClientGoneError(Exception):
    """The client hung up before its request was whole: there is nobody to answer."""


class Body:
    """A request's body, read ahead of the application, which then gets it as if nothing had happened.

    A policy that is asked from inside of the handler comes after the application has read: where it may need the body,
    ``keep`` has what passes kept, up to a bound.
    """

    __slots__ = ("_ahead", "_chunks", "_keep", "_metadata", "_more", "_over", "_receive", "_size")

    def __init__(self, metadata: Metadata, receive: Receive) -> None:
        self._metadata = metadata
        self._receive = receive
        self._ahead: list[Message] = []
        self._chunks: list[bytes] = []
        self._size = 0
        self._more = True
        self._over = False
        self._keep = 0

    async def read(self, limit: int) -> bytes:
        """Return the whole body.

        Raises:
            PayloadTooLargeError: it is, or says it is, over ``limit`` bytes.
            ClientGoneError: it ended before it was whole.
        """
        declared = self._metadata.get("content-length") or ""
        if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
            raise PayloadTooLargeError(limit)
        passed = len(self._chunks)
        self._keep = limit
        while self._more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            self._see(message)
            if self._over:
                break
        if self._over or self._size > limit:
            raise PayloadTooLargeError(limit)
        body = b"".join(self._chunks)
        if len(self._chunks) > passed:
            # What the application has not seen yet.
            rest = b"".join(self._chunks[passed:])
            self._ahead.append({"type": "http.request", "body": rest, "more_body": False})
        self._chunks = [body]
        return body

    def receiver(self, keep: int = 0) -> Receive:
        """Return what the application reads from: nothing in between where nothing was, or need be, kept."""
        self._keep = keep
        return self._replay if self._ahead or keep else self._receive

    def _see(self, message: Message) -> None:
        chunk: bytes = message.get("body", b"")
        self._more = message.get("more_body", False)
        self._size += len(chunk)
        if self._size > self._keep:
            self._over = True
            self._chunks.clear()
        else:
            self._chunks.append(chunk)

    async def _replay(self) -> Message:
        if self._ahead:
            return self._ahead.pop()
        message = await self._receive()
        if message["type"] == "http.request" and self._more and not self._over:
            self._see(message)
        return message
