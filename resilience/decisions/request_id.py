"""Ground floor: which ids of a caller are taken over. Mints nothing: new ids are handed in."""

import re
from typing import NamedTuple

# Fits UUID, hex, ULID, X-Ray and ours; no space, quote, comma, control or non-ASCII character, so that an id is safe in
# a header, a log line and a key.
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Source: W3C Trace Context, 3.2.2: lower-case hex; version ff is invalid; later versions may append fields.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-[\x21-\x7e]{1,128})?")
# Source: W3C Trace Context, 3.3.1; bounded, and printable ASCII only.
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")
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
