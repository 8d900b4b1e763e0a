"""Floor 4: the servicer context that handlers see: merges trailers, records the status, and survives the RPC."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import grpc
from grpc.aio import AbortError

Trailers = Iterable[tuple[str, str | bytes]]

STATUS_DETAILS = "grpc-status-details-bin"
"""The trailer with a serialised ``google.rpc.Status``; a client reads it only where it agrees with code and message."""


class GuardedContext:
    """Stands before a ``grpc.aio.ServicerContext`` and passes on what it does not change.

    Facts
    - ``set_trailing_metadata`` and ``abort`` replace what was set before; here they merge, and the handler's
      value wins over ours.
    - Reading the peer or the auth context of an RPC that has ended crashes the process (grpcio 1.81 to 1.85); here
      the peer is read once, at the start, and the rest only while the RPC lives.
    - ``abort`` sends the status at once; for a kept reply it is held until the reply is stored.

    Args:
        context: the real one.
        ours: name and value pairs to add to the trailers; read each time, so that it may grow.
        metadata: the invocation metadata.
    """

    __slots__ = (
        "_context",
        "_details",
        "_held",
        "_identities",
        "_live",
        "_metadata",
        "_ours",
        "_peer",
        "_rpc",
        "_theirs",
        "aborted",
        "instead",
        "status",
    )

    def __init__(self, context: Any, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._context = context
        self._metadata = metadata
        self._peer: str = context.peer()
        self._ours: Sequence[tuple[str, str]] = ()
        self._theirs: tuple[tuple[str, str | bytes], ...] = ()
        self._held = False
        self._live = True
        self._rpc: Any = asyncio.current_task()
        self.aborted = False
        """Whether the handler aborted, though it may have swallowed what ``abort`` raised."""
        self.instead: Callable[[], Awaitable[None]] | None = None
        """Asked before the handler's own abort: ends the RPC with what a policy answered, if one did."""
        self._details = ""
        self._identities: tuple[Any, Any, Mapping[str, Any]] | None = None
        self.status: grpc.StatusCode | None = None
        """The code that the handler set or aborted with; None while it is OK."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def add_trailers(self, ours: Sequence[tuple[str, str]]) -> None:
        """Send ``ours`` with whatever ends the RPC. The sequence is read anew at each ``tell`` and each abort."""
        self._ours = ours

    def tell(self) -> None:
        """Hand the trailers, as they are now, to the RPC."""
        if self._alive():
            self._context.set_trailing_metadata(self._merged(()))

    def hold(self) -> None:
        """From now on record an ``abort`` instead of sending it; ``send_held`` does."""
        self._held = True

    def detach(self) -> None:
        """Forget the RPC: its client is gone, and its context must not be touched again."""
        self._live = False

    async def send_held(self) -> None:
        """Send the recorded abort, if there is one and anybody to send it to. Raises what ``abort`` raises."""
        if self._held and self.aborted and self._alive():
            await self._context.abort(self.status, self._details, self._merged(()))

    async def refuse(self, code: grpc.StatusCode, details: str, trailers: Trailers = ()) -> NoReturn:
        """End the RPC with a status of ours, whatever the handler recorded; ``trailers`` win over every other."""
        self.status, self._details = code, details
        self._theirs = tuple(pair for pair in self._theirs if pair[0] != STATUS_DETAILS)
        await self._context.abort(code, details, self._merged(tuple(trailers)))
        raise AssertionError("abort returned")

    def insist(self) -> None:
        """Raise what ``abort`` raised, if the handler has swallowed it."""
        if self.aborted:
            raise AbortError(self._details)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return what the handler set."""
        return self._theirs

    def set_trailing_metadata(self, trailing_metadata: Trailers) -> None:
        """Send these with whatever ends the RPC, beside ours."""
        self._theirs = tuple(trailing_metadata)
        self.tell()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers = ()) -> NoReturn:
        """End the RPC with ``code``. Always raises."""
        if self.instead is not None:
            await self.instead()
        self.status, self._details, self.aborted = code, details, True
        self._theirs = _merge(self._theirs, tuple(trailing_metadata))
        if self._held or not self._alive():
            raise AbortError(details)
        await self._context.abort(code, details, self._merged(()))
        raise AssertionError("abort returned")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the RPC with a rich status. Always raises."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the code that the RPC ends with if the handler returns."""
        self.status = None if code is grpc.StatusCode.OK else code
        if self._alive():
            self._context.set_code(code)

    def code(self) -> grpc.StatusCode | None:
        """Return the code that was set, or None."""
        return self.status

    def set_details(self, details: str) -> None:
        """Set the message that goes with the code."""
        self._details = details
        if self._alive():
            self._context.set_details(details)

    def details(self) -> str:
        """Return the message that was set, or ``""``."""
        return self._details

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """Return what the client sent beside the message."""
        return self._metadata

    def peer(self) -> str:
        """Return who called, as known when the call began."""
        return self._peer

    def time_remaining(self) -> float | None:
        """Return the seconds until the client's deadline, or None where it set none; 0 once the RPC is over."""
        remaining: float | None = self._context.time_remaining() if self._alive() else 0.0
        return remaining

    def peer_identities(self) -> Any:
        """Return the peer's identities; None where it has none, or once the RPC is over and nobody asked before."""
        return self._known()[0]

    def peer_identity_key(self) -> Any:
        """Return the name of the property that identifies the peer, or None."""
        return self._known()[1]

    def auth_context(self) -> Mapping[str, Any]:
        """Return the properties of the peer's authentication."""
        return self._known()[2]

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Have ``callback`` called with this context once the RPC is over."""
        self._context.add_done_callback(lambda _context: callback(self))

    def _alive(self) -> bool:
        # grpc frees the call at the end of the RPC's own task, so from then on nothing of it may be touched.
        return self._live and not self._rpc.done()

    def _known(self) -> tuple[Any, Any, Mapping[str, Any]]:
        if self._identities is None:
            if not self._alive():
                return None, None, {}
            context = self._context
            self._identities = (context.peer_identities(), context.peer_identity_key(), context.auth_context())
        return self._identities

    def _merged(self, more: Sequence[tuple[str, str | bytes]]) -> tuple[tuple[str, str | bytes], ...]:
        return _merge(tuple(self._ours), _merge(self._theirs, tuple(more)))


def _merge(
    below: tuple[tuple[str, str | bytes], ...], above: tuple[tuple[str, str | bytes], ...]
) -> tuple[tuple[str, str | bytes], ...]:
    """Return both; of a name in both, only what is above."""
    if not above or not below:
        return above or below
    names = {name for name, _ in above}
    return (*(pair for pair in below if pair[0] not in names), *above)
