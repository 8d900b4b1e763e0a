"""Floor 4: the servicer context that handlers see: merges trailers, records the status, and survives the RPC."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn
from weakref import ref

import grpc
from grpc.aio import EOF, AbortError, InternalError, UsageError

from grpc_interceptors.room import fit_limits
from grpc_interceptors.trailers import STATUS_DETAILS, Pairs, Trailers, checked, merged
from resilience.admission import Admission, Refused
from resilience.verdict import Reject

_CONFIRMING_SECONDS = 0.5  # Only for a stream that an interceptor ended before its client did.
_TURNS = 3  # An interceptor that runs its handler in a task of its own passes a cancellation on a turn later.


class GuardedContext:
    """Stands before a ``grpc.aio.ServicerContext`` and passes on what it does not change.

    Facts
    - ``set_trailing_metadata`` and ``abort`` replace what was set before; here they merge, and the handler's
      value wins over ours.
    - Reading the peer or the auth context of an RPC that has ended crashes the process (grpcio 1.81 to 1.85); here
      the peer is read once, at the start, and the rest only while the RPC lives.
    - ``abort`` sends the status at once; for a kept reply it is held until the reply is stored.
    - The requests of a client that left end like those of one that is done, and the cancellation comes later; here
      they end when the client says so, and else the cancellation comes.

    Args:
        context: the real one.
        metadata: the invocation metadata.
        peer: who called.
    """

    # What most calls never set stands at the class.
    aborted = False
    """Whether the handler aborted, though it may have swallowed what ``abort`` raised."""
    status: grpc.StatusCode | None = None
    """The code that the handler set or aborted with; None while it is OK."""
    departed = False
    """Whether the client had left when it was to be told how its RPC ends."""
    admission: Admission
    """The call's, whose metadata is sent with whatever ends the RPC; set once the call has one."""
    _details = ""
    _held = False
    _live = True
    _identities: tuple[Any, Any, Mapping[str, Any]] | None = None
    _over: BaseException | None = None
    _theirs: Pairs = ()

    def __init__(self, context: Any, metadata: Sequence[tuple[str, str | bytes]], peer: str) -> None:
        self._context = context
        self._metadata = metadata
        self._peer = peer
        # Weak, since the task holds this in turn, and a circle would keep each call until the next collection.
        self._rpc: Any = ref(asyncio.current_task())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def tell(self) -> None:
        """Hand the trailers, as they are now, to the RPC."""
        rpc = self._rpc()
        if self._live and rpc is not None and not rpc.done():
            self._context.set_trailing_metadata(self._merged())

    def hold(self) -> None:
        """From now on record an ``abort`` instead of sending it; ``send_held`` does."""
        self._held = True

    def detach(self) -> None:
        """Forget the RPC: its client is gone, and its context must not be touched again."""
        self._live = False

    async def send_held(self) -> None:
        """Send the recorded abort, if there is one and anybody to send it to. Raises what ``abort`` raises."""
        if self._held and self.aborted and self.is_alive():
            await self._end(self.status, self._details, self._merged())

    async def refuse(self, code: grpc.StatusCode, details: str, trailers: Trailers = ()) -> NoReturn:
        """End the RPC with a status of ours, whatever the handler recorded; ``trailers`` win over every other.

        Raises:
            AbortError: always; what grpc raised, if the RPC had its status already.
            CancelledError: nobody is there to be told.
        """
        if self._over is None:
            self.status, self._details = code, details
        self._theirs = tuple(pair for pair in self._theirs if pair[0] != STATUS_DETAILS)
        await self._end(code, details, merged(self._merged(), tuple(trailers)))

    def insist(self) -> None:
        """Raise what ``abort`` raised, if the handler has swallowed it."""
        if self.aborted:
            raise AbortError(self._details)

    def trailing_metadata(self) -> Pairs:
        """Return what the handler set."""
        return self._theirs

    def set_trailing_metadata(self, trailing_metadata: Trailers) -> None:
        """Send these with whatever ends the RPC, beside ours."""
        self._theirs = checked(trailing_metadata)
        self.tell()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers = ()) -> NoReturn:
        """End the RPC with ``code``. Always raises."""
        if isinstance(self.admission.verdict, Reject):
            # An interceptor further in, which maps exceptions to statuses, has caught a refusal.
            raise Refused(self.admission.verdict)
        if code is grpc.StatusCode.OK:
            raise ValueError("An RPC can't be aborted with OK; grpc would leave its client without a status")
        theirs = merged(self._theirs, checked(trailing_metadata))
        self.status, self._details, self.aborted, self._theirs = code, details, True, theirs
        if self._held or not self.is_alive():
            raise AbortError(details)
        await self._end(code, details, self._merged())

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the RPC with a rich status. Always raises."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    async def send_initial_metadata(self, initial_metadata: Trailers) -> None:
        """Send the initial metadata now. After it, the client doesn't retry by itself."""
        sent = checked(initial_metadata)
        try:
            await self._context.send_initial_metadata(sent)
        except InternalError:
            if not self._held:  # what is kept goes on without its client
                raise

    async def read(self) -> Any:
        """Return the client's next message, or ``EOF`` once it has said that there are no more."""
        message = await self._context.read()
        if message is EOF:
            await self.confirm_end()
        return message

    async def confirm_end(self) -> None:
        """Make sure that the requests ended because the client said so.

        grpc tells the end of a cancelled stream, too, and the cancellation only then: a moment later, through the same
        queue. One more read is answered at once, and through that queue, hence after it.

        Raises:
            CancelledError: they ended because the client left, or its deadline passed.
        """
        try:
            async with asyncio.timeout(_CONFIRMING_SECONDS):
                await self._context.read()
        except (TimeoutError, UsageError):
            pass  # ended by an interceptor, or the handler replied meanwhile
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        rpc = self._rpc()
        if rpc is None or rpc.cancelling():  # and this may be another task, which nobody cancels
            raise asyncio.CancelledError

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the code that the RPC ends with if the handler returns."""
        self.status = None if code is grpc.StatusCode.OK else code
        if self.is_alive():
            self._context.set_code(code)

    def code(self) -> grpc.StatusCode | None:
        """Return the code that was set, or None."""
        return self.status

    def set_details(self, details: str) -> None:
        """Set the message that goes with the code."""
        self._details = details
        if self.is_alive():
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
        remaining: float | None = self._context.time_remaining() if self.is_alive() else 0.0
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

    def is_alive(self) -> bool:
        """Tell whether the RPC is not over yet, as far as is known; from any thread."""
        # grpc frees the call at the end of the RPC's own task, so from then on nothing of it may be touched.
        rpc = self._rpc()
        return self._live and rpc is not None and not rpc.done()

    async def _end(self, code: Any, details: str, trailers: Pairs) -> NoReturn:
        if self._over is None:
            try:
                await self._context.abort(code, details, trailers)
            except AbortError as error:
                self._over = error
            except InternalError:
                # After an attempt at a status, grpc injects no cancellation any more.
                self._over, self.departed = asyncio.CancelledError(), True
            rpc = self._rpc()
            if rpc is not None and self._over is not None:
                rpc.add_done_callback(partial(_forget, self._over))
        raise self._over or AssertionError("abort returned")

    def _known(self) -> tuple[Any, Any, Mapping[str, Any]]:
        if self._identities is None:
            if not self.is_alive():
                return None, None, {}
            context = self._context
            self._identities = (context.peer_identities(), context.peer_identity_key(), context.auth_context())
        return self._identities

    def _merged(self) -> Pairs:
        admission = self.admission
        if len(admission.limits) > 1:
            fit_limits(admission)
        ours = tuple(admission.metadata)
        return merged(ours, self._theirs) if self._theirs else ours


def _forget(error: BaseException, _rpc: object) -> None:
    """Drop what an error remembers of its way, once its RPC is over.

    grpc's state of the RPC keeps the error, and that the frames it has passed, which keep the state: some 65 objects of
    each refused call would wait for the collector.
    """
    error.__traceback__ = error.__context__ = None
