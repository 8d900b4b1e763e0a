"""Floor 2: ids in, context open, ids out."""

import os
from collections.abc import Callable
from time import monotonic

from resilience import wire
from resilience.admission import Admission
from resilience.call import Call
from resilience.context import RequestContext
from resilience.decisions.request_id import accept_id, accept_timeout, accept_traceparent, accept_tracestate
from resilience.verdict import PROCEED, Verdict

_POOL = 256


class IdMint:
    """Mints 32 hex digits at a time from pooled ``os.urandom``: unguessable, and a third of the cost of one call each.

    Safe among threads (``list.pop`` is atomic) and across forks (a child starts with an empty pool).
    """

    def __init__(self) -> None:
        self._pool: list[str] = []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._pool.clear)

    def __call__(self) -> str:
        """Return an id that was never returned before."""
        try:
            return self._pool.pop()
        except IndexError:
            text = os.urandom(16 * _POOL).hex()
            self._pool.extend(text[at : at + 32] for at in range(32, len(text), 32))
            return text[:32]


class RequestContextPolicy:
    """Opens the request context and sends its ids back with whatever leaves.

    The request id is minted here, always; one that the caller sent is kept as ``parent_request_id``. The correlation
    id is the caller's if it is valid, else the trace id of its ``traceparent``, else minted. An invalid id is
    replaced and never echoed.

    A caller that says for how long it waits (``x-request-timeout-ms``, over HTTP as in gRPC's metadata) gives the
    context its deadline. Nothing here ends a call for being late: the deadline is for the handler to look at
    (``get_request_context().remaining()``) and for the next service to be told.

    Args:
        mint: returns a new id: 1 to 64 characters of the allowlist in ``decisions.request_id``, unguessable.
        clock: reads the seconds that deadlines are kept on; monotonic.
    """

    def __init__(self, mint: Callable[[], str] | None = None, *, clock: Callable[[], float] = monotonic) -> None:
        self._mint = mint or IdMint().__call__  # a bound method: to call an object takes twice as long
        self._clock = clock

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Open the context. Always proceeds."""
        get = call.metadata.sent.get
        request_id = "req_" + self._mint()
        correlation_id = accept_id(get(wire.CORRELATION_ID))
        sent = get(wire.TRACEPARENT)
        trace = None if sent is None else accept_traceparent(sent)
        if correlation_id is None:
            correlation_id = self._mint() if trace is None else trace.trace_id
        context = RequestContext(request_id, correlation_id)
        context.protocol = call.protocol
        # Most calls send none of the rest, and what is not there needs no look.
        if (sent := get(wire.REQUEST_ID)) is not None:
            context.parent_request_id = accept_id(sent)
        if trace is not None:
            context.traceparent = trace.traceparent
            context.tracestate = accept_tracestate(get(wire.TRACESTATE))
        if (sent := get(wire.REQUEST_TIMEOUT)) is not None and (timeout := accept_timeout(sent)) is not None:
            context.set_deadline(self._clock() + timeout, self._clock)
        admission.open(context)
        admission.metadata += ((wire.REQUEST_ID, request_id), (wire.CORRELATION_ID, correlation_id))
        return PROCEED
