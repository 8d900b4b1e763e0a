"""Ground floor: which ids and bounds of a caller are taken over. Mints nothing: new ids are handed in."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

# Fits UUID, hex, ULID, X-Ray and ours; no space, quote, comma, control or non-ASCII character, so that an id is safe in
# a header, a log line and a key.
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Source: W3C Trace Context, 3.2.2: lower-case hex; version ff is invalid; later versions may append fields.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-[\x21-\x7e]{1,128})?")
# Source: W3C Trace Context, 3.3.1; bounded, and printable ASCII only.
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")
_TIMEOUT_MS = re.compile(r"[1-9][0-9]{0,7}")
_LONGEST_TIMEOUT_MS = 86_400_000
_ZERO_TRACE, _ZERO_SPAN = "0" * 32, "0" * 16


class Trace(NamedTuple):
    """A valid inbound trace context, unchanged, with its trace id beside it."""

    traceparent: str
    trace_id: str


def accept_id(value: str | None) -> str | None:
    """Return a caller's id if it is 1 to 128 characters of the allowlist, else None."""
    return value if value is not None and _ID.fullmatch(value) else None


def accept_traceparent(value: str | None) -> Trace | None:
    """Return the trace context of a valid ``traceparent``, else None. Source: W3C Trace Context, 3.2."""
    match = _TRACEPARENT.fullmatch(value) if value else None
    if value is None or match is None or match[1] == _ZERO_TRACE or match[2] == _ZERO_SPAN:
        return None
    if value[:2] == "00" and match[3] is not None:
        return None
    return Trace(value, match[1])


def accept_tracestate(value: str | None) -> str | None:
    """Return a ``tracestate`` that is printable and at most 512 characters, else None."""
    return value if value is not None and _TRACESTATE.fullmatch(value) else None


def render_traceparent(trace_id: int, span_id: int, flags: int) -> str:
    """Return the ``traceparent`` of a span. Source: W3C Trace Context, 3.2."""
    return f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"


def accept_timeout(value: str | None) -> float | None:
    """Return the seconds of a timeout that is sent as a plain decimal of 1 to 86,400,000 ms (a day), else None."""
    if value is None or not _TIMEOUT_MS.fullmatch(value):
        return None
    timeout_ms = int(value)
    return timeout_ms / 1000 if timeout_ms <= _LONGEST_TIMEOUT_MS else None


def accept_name(value: str) -> str | None:
    """Return a user's or a tenant's name if it is 1 to 256 printable characters, else None.

    Wider than an id, since the application chose it (``auth0|5f7c``, ``Zoë``); but no line break, control character
    or change of direction, with which it could forge a log line.
    """
    return value if len(value) <= 256 and value and value.isprintable() else None


def _accept_protocol(value: str) -> str | None:
    return value if value in {"http", "grpc"} else None


def _accept_traceparent(value: str) -> str | None:
    trace = accept_traceparent(value)
    return trace.traceparent if trace is not None else None


ACCEPT: Mapping[str, Callable[[str], str | None]] = {
    "request_id": accept_id,
    "correlation_id": accept_id,
    "parent_request_id": accept_id,
    "user_id": accept_name,
    "tenant_id": accept_name,
    "protocol": _accept_protocol,
    "traceparent": _accept_traceparent,
    "tracestate": accept_tracestate,
}
"""How each member of a context is told from what only looks like it."""
