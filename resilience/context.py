"""Ground floor: who is calling and under which ids, reachable from anywhere in the call.

One mutable object in one ContextVar. Mutable on purpose: a value that a sync dependency *rebinds* is lost with its
thread's copy of the context, one that it *changes* is seen by everybody.
"""

import sys
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import ContextVar, Token
from dataclasses import asdict, dataclass
from typing import Any, Self

from resilience import wire
from resilience.call import Protocol
from resilience.decisions.request_id import ACCEPT, accept_tracestate, render_traceparent


class RequestContext:
    """The ids, the caller and the deadline of one call. Falsy outside of any call.

    Args:
        request_id: of this one hop; minted here. None outside of a call.
        correlation_id: of the whole chain of calls. None outside of a call.
        parent_request_id: the request id that the calling service sent.
        user_id, tenant_id: as the application's authentication told ``set_context_user``.
        protocol: the door the call came through.
        traceparent, tracestate: the inbound W3C trace context, unchanged.
    """

    __slots__ = (
        "_clock",
        "_fields",
        "correlation_id",
        "deadline",
        "parent_request_id",
        "protocol",
        "request_id",
        "tenant_id",
        "traceparent",
        "tracestate",
        "user_id",
    )

    def __init__(
        self,
        request_id: str | None = None,
        correlation_id: str | None = None,
        *,
        parent_request_id: str | None = None,
        user_id: str | None = None,
        tenant_id: str | None = None,
        protocol: Protocol | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.correlation_id = correlation_id
        self.parent_request_id = parent_request_id
        self.user_id = user_id
        self.tenant_id = tenant_id
        self.protocol = protocol
        self.traceparent = traceparent
        self.tracestate = tracestate
        self.deadline: float | None = None
        """When the caller stops waiting, on the clock of ``set_deadline``; None where it waits for ever."""
        self._clock: Callable[[], float] | None = None
        self._fields: dict[str, str] | None = None

    def __bool__(self) -> bool:
        return self.request_id is not None

    def set_user(self, user_id: str | None, tenant_id: str | None = None) -> None:
        """Name the caller, as authentication found it."""
        self.user_id, self.tenant_id, self._fields = user_id, tenant_id, None

    def set_deadline(self, deadline: float | None, clock: Callable[[], float]) -> None:
        """Tell when the caller stops waiting: a reading of ``clock``, which is monotonic; None for never."""
        self.deadline, self._clock = deadline, clock

    def remaining(self, now: float | None = None) -> float | None:
        """Return for how many more seconds the caller waits: 0.0 once it has stopped; None where it waits for ever.

        Args:
            now: a reading of the deadline's own clock. The default reads it.
        """
        if self.deadline is None or self._clock is None:
            return None
        return max(0.0, self.deadline - (self._clock() if now is None else now))

    def log_fields(self) -> dict[str, str]:
        """Return what every log line of this call carries; built once, so don't change it."""
        if self._fields is None:
            named = {name: getattr(self, name) for name in LOGGED}
            self._fields = {name: value for name, value in named.items() if value is not None}
        return self._fields


LOGGED = ("request_id", "correlation_id", "protocol", "user_id", "tenant_id")
"""What a log line of a call may carry."""

_current: ContextVar[RequestContext | None] = ContextVar("resilience_context", default=None)


def get_request_context() -> RequestContext:
    """Return the context of the running call; outside of one, one without ids, which is falsy. Never raises."""
    context = _current.get()
    return context if context is not None else RequestContext()


def running_context() -> RequestContext | None:
    """Return the context of the running call, or None outside of one. For doors and policies."""
    return _current.get()


def get_request_id() -> str | None:
    """Return the id of the running call, or None outside of one."""
    context = _current.get()
    return context.request_id if context is not None else None


def get_correlation_id() -> str | None:
    """Return the id of the chain of calls that the running one belongs to, or None outside of one."""
    context = _current.get()
    return context.correlation_id if context is not None else None


def set_context_user(user_id: str | None, tenant_id: str | None = None) -> None:
    """Name the caller of the running call, from wherever authentication happens.

    Before our door has opened (an authentication middleware outside of ours) the name waits, and the door adopts it.
    """
    context = _current.get()
    if context is None:
        context = RequestContext()
        _current.set(context)
    context.set_user(user_id, tenant_id)


def open_context(context: RequestContext) -> Token[RequestContext | None]:
    """Make ``context`` the running call's, adopting a user that was set just before. For doors and policies."""
    waiting = _current.get()
    if waiting is not None and not waiting:
        context.user_id, context.tenant_id = waiting.user_id, waiting.tenant_id
        waiting.set_user(None)  # adopted once: the next call of this task is another's
    return _current.set(context)


def close_context(token: Token[RequestContext | None]) -> None:
    """Restore what was there before ``open_context``. Closing from another task's context does nothing."""
    try:
        _current.reset(token)
    except ValueError:
        pass  # an async generator finalised late runs in another Context, where there is nothing to restore


def get_tracing_headers() -> dict[str, str]:
    """Return the metadata that carries the running call to the next service; empty outside of a call.

    It holds the ids, what is left of the deadline (never the user: who may know that is for the application to say),
    and the trace: OpenTelemetry's where a span of it is current, else the inbound one unchanged. The names are
    lower-case, which HTTP takes and gRPC demands: one dict for both.
    """
    context = _current.get()
    if context is None or context.request_id is None or context.correlation_id is None:
        return {}
    headers = {wire.CORRELATION_ID: context.correlation_id, wire.REQUEST_ID: context.request_id}
    remaining = context.remaining()
    if remaining is not None:
        # Rounded down, so that nobody works for longer than the first caller waits; 1 is as good as over.
        headers[wire.REQUEST_TIMEOUT] = str(max(1, int(remaining * 1000)))
    traceparent, tracestate = _current_span() or (context.traceparent, context.tracestate)
    if traceparent is not None:
        headers[wire.TRACEPARENT] = traceparent
        if tracestate is not None:
            headers[wire.TRACESTATE] = tracestate
    return headers


def _current_span() -> tuple[str, str | None] | None:
    # Whoever has a span current has imported the API; who has not is not made to, nor kept waiting for it.
    get_current_span = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if get_current_span is None:
        return None
    span = get_current_span().get_span_context()
    if not span.is_valid:
        return None
    traceparent = render_traceparent(span.trace_id, span.span_id, span.trace_flags)
    return traceparent, accept_tracestate(span.trace_state.to_header())


def add_request_context(_logger: object, _method: str, event_dict: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Add the running call's ids to a log event: a structlog processor. The event's own keys win."""
    context = _current.get()
    if context is None:
        return event_dict
    return {**context.log_fields(), **event_dict}


@dataclass(frozen=True, slots=True)
class ContextSnapshot:
    """The ids and the caller of a call, frozen: picklable, and free of the call it was taken from.

    The deadline stays behind: a job is not over because the caller that asked for it stopped waiting.
    """

    request_id: str | None
    correlation_id: str | None
    parent_request_id: str | None
    user_id: str | None
    tenant_id: str | None
    protocol: Protocol | None
    traceparent: str | None
    tracestate: str | None

    def to_dict(self) -> dict[str, str | None]:
        """Return the snapshot as plain data, for a queue's message headers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a snapshot that ``to_dict`` made.

        A queue is outside, too: members that are unknown are left out, those that are missing, or are not what a
        door would have let in, are None.
        """
        return cls(**{name: _accepted(name, data.get(name)) for name in cls.__slots__})


def _accepted(name: str, value: object) -> Any:
    return ACCEPT[name](value) if isinstance(value, str) else None


def copy_context() -> ContextSnapshot:
    """Take a snapshot of the running call's context, to carry into a background job."""
    context = get_request_context()
    return ContextSnapshot(**{name: getattr(context, name) for name in ContextSnapshot.__slots__})


class RestoredContext:
    """What ``restore_context`` returns: restored at once, and put back at the end of a ``with``."""

    __slots__ = ("_token", "context")

    def __init__(self, context: RequestContext) -> None:
        self.context = context
        self._token = _current.set(context)

    def __enter__(self) -> RequestContext:
        return self.context

    def __exit__(self, *_: object) -> None:
        close_context(self._token)


def restore_context(snapshot: ContextSnapshot) -> RestoredContext:
    """Make a snapshot the running context: for good when called, for a block when used in a ``with``.

    The restored context is a new object: what the background job changes never leaks back into the call.
    """
    names = ContextSnapshot.__slots__
    return RestoredContext(RequestContext(**{name: getattr(snapshot, name) for name in names}))
