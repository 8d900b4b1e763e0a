"""Ground floor: one inbound call, told without its wire. Never reads a clock or a socket."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal
from typing import Protocol as Shape

Protocol = Literal["http", "grpc"]


class Metadata(Shape):
    """A door's view over what the caller sent beside the payload; names are lower-case."""

    def get(self, name: str) -> str | None:
        """Return the first value sent under ``name``, or None."""
        ...

    def get_all(self, name: str) -> Sequence[str]:
        """Return every value sent under ``name``, in the order sent."""
        ...


class Call:
    """One inbound call. Built by a door for every call, hence slots and no freezing.

    Args:
        protocol: the door it came through.
        operation: the registered name, never a caller's own text: ``"POST /orders/{id}"``,
            ``"/pkg.Service/Method"``, or ``UNMATCHED``. A function is called once, when first asked for.
        metadata: what came beside the payload.
        peer: the caller's network address without its port, or None (a unix socket).
        streaming: True where no single payload or no single reply exists.
        safe: True where the operation promises no side effects, so that a key means nothing.
    """

    __slots__ = ("_operation", "_resolve", "metadata", "payload", "peer", "protocol", "resource", "safe", "streaming")

    payload: Callable[[int], Awaitable[bytes]]
    """Reads the whole payload once, at most ``limit`` bytes; raises PayloadTooLargeError."""

    resource: Callable[[], str]
    """What the call addresses beyond its operation: path values and query, or ``""``."""

    def __init__(
        self,
        protocol: Protocol,
        operation: str | Callable[[], str],
        metadata: Metadata,
        *,
        peer: str | None = None,
        streaming: bool = False,
        safe: bool = False,
        payload: Callable[[int], Awaitable[bytes]] | None = None,
        resource: Callable[[], str] | None = None,
    ) -> None:
        self.protocol: Protocol = protocol
        self._resolve = operation
        self._operation: str | None = None
        self.metadata = metadata
        self.peer = peer
        self.streaming = streaming
        self.safe = safe
        self.payload = payload or _no_payload
        self.resource = resource or _no_resource

    @property
    def operation(self) -> str:
        """The registered name of what is called, resolved on first use."""
        if self._operation is None:
            resolve = self._resolve
            self._operation = resolve if isinstance(resolve, str) else resolve()
        return self._operation

    def rename(self, operation: str | Callable[[], str], resource: Callable[[], str]) -> None:
        """Take what the door now knows of the target: something on the way in may have rewritten it."""
        self._resolve, self._operation, self.resource = operation, None, resource


UNMATCHED = "unmatched"
"""The operation of every call that no registered route or method answers: one name, so a caller can't make new ones."""


async def _no_payload(_limit: int) -> bytes:
    return b""


def _no_resource() -> str:
    return ""
