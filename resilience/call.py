"""Ground floor: one inbound call, told without its wire. Never reads a clock or a socket."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal
from typing import Protocol as Shape

Protocol = Literal["http", "grpc"]


class Metadata(Shape):
    """A door's view over what the caller sent beside the payload; names are lower-case."""

    @property
    def sent(self) -> Mapping[str, str]:
        """The first value of each name in ``wire.SENT`` that was sent: found in one go, since every call is asked."""
        ...

    def get(self, name: str) -> str | None:
        """Return the first value sent under ``name``, or None."""
        ...

    def get_all(self, name: str) -> Sequence[str]:
        """Return every value sent under ``name``, in the order sent."""
        ...


class Call:
    """One inbound call. A door has a class of its own where it can spare work until somebody asks for it.

    Args:
        protocol: the door it came through.
        operation: the registered name, never a caller's own text: ``"POST /orders/{id}"``,
            ``"/pkg.Service/Method"``, or ``UNMATCHED``.
        metadata: what came beside the payload.
        peer: the caller's network address without its port, or None (a unix socket).
        streaming: True where no single payload or no single reply exists.
        safe: True where the operation promises no side effects, so that a key means nothing.
        payload: reads the whole payload once; None where there is none.
        resource: see the method.
    """

    # Without slots: what most calls don't say stands at the class, and costs them nothing.
    protocol: Protocol
    metadata: Metadata
    peer: str | None = None
    streaming = False
    safe = False

    def __init__(
        self,
        protocol: Protocol,
        operation: str,
        metadata: Metadata,
        *,
        peer: str | None = None,
        streaming: bool = False,
        safe: bool = False,
        payload: Callable[[int], Awaitable[bytes]] | None = None,
        resource: str = "",
    ) -> None:
        self.protocol = protocol
        self._operation = operation
        self.metadata = metadata
        self.peer = peer
        self.streaming = streaming
        self.safe = safe
        self._payload = payload or _no_payload
        self._resource = resource

    @property
    def operation(self) -> str:
        """The registered name of what is called."""
        return self._operation

    def resource(self) -> str:
        """Return what the call addresses beyond its operation: path values and query, or ``""``."""
        return self._resource

    def payload(self, limit: int) -> Awaitable[bytes]:
        """Read the whole payload; an empty one where there is none.

        Args:
            limit: the most bytes it may have.

        Raises:
            PayloadTooLargeError: it has more.
        """
        return self._payload(limit)


UNMATCHED = "unmatched"
"""The operation of every call that no registered route or method answers: one name, so a caller can't make new ones."""


async def _no_payload(_limit: int) -> bytes:
    return b""
