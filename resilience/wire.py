"""Ground floor: the one table both doors render, and every name that leaves through them.

Literals on purpose: a row is compared to its specification by eye, and ``docs/wire.md`` is rendered from here.
"""

from collections.abc import Sequence
from enum import Enum
from math import ceil
from typing import Literal, NamedTuple

from resilience.decisions.quota import Quota, Usage


class Reason(Enum):
    """Why a call was refused; the value is the stable, machine-readable code."""

    RATE_LIMITED = "rate_limited"
    IDEMPOTENCY_KEY_MISSING = "idempotency_key_missing"
    IDEMPOTENCY_KEY_MALFORMED = "idempotency_key_malformed"
    IDEMPOTENCY_IN_PROGRESS = "idempotency_in_progress"
    IDEMPOTENCY_PAYLOAD_MISMATCH = "idempotency_payload_mismatch"
    IDEMPOTENCY_NOT_REPLAYABLE = "idempotency_not_replayable"
    IDEMPOTENCY_ABANDONED = "idempotency_abandoned"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    DRAINING = "draining"
    STORE_UNAVAILABLE = "store_unavailable"


class Row(NamedTuple):
    """One refusal on both wires.

    Args:
        http: the status.
        grpc: the status code's number.
        grpc_name: the same, by name.
        retry: ``after``: the same call can succeed later. ``never``: it can't, so gRPC clients are told to
            stop (pushback -1). ``changed``: only another call can.
    """

    http: int
    grpc: int
    grpc_name: str
    retry: Literal["after", "changed", "never"]


TABLE: dict[Reason, Row] = {
    Reason.RATE_LIMITED: Row(429, 8, "RESOURCE_EXHAUSTED", "after"),
    Reason.IDEMPOTENCY_KEY_MISSING: Row(400, 3, "INVALID_ARGUMENT", "changed"),
    Reason.IDEMPOTENCY_KEY_MALFORMED: Row(400, 3, "INVALID_ARGUMENT", "changed"),
    Reason.IDEMPOTENCY_IN_PROGRESS: Row(409, 10, "ABORTED", "after"),
    Reason.IDEMPOTENCY_PAYLOAD_MISMATCH: Row(422, 9, "FAILED_PRECONDITION", "changed"),
    Reason.IDEMPOTENCY_NOT_REPLAYABLE: Row(409, 6, "ALREADY_EXISTS", "changed"),
    Reason.IDEMPOTENCY_ABANDONED: Row(409, 9, "FAILED_PRECONDITION", "never"),
    Reason.PAYLOAD_TOO_LARGE: Row(413, 8, "RESOURCE_EXHAUSTED", "never"),
    Reason.DRAINING: Row(503, 14, "UNAVAILABLE", "after"),
    Reason.STORE_UNAVAILABLE: Row(503, 14, "UNAVAILABLE", "after"),
}

# Answers that say "try again": an answer in this set is never stored, so that the retry really runs.
HTTP_NOT_FINAL = frozenset({401, 403, 408, 409, 423, 425, 429})
# OK, INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED.
GRPC_FINAL = frozenset({0, 3, 5, 6, 9, 11, 12})


def is_final_http(status: int) -> bool:
    """Tell whether an HTTP status is an answer to keep: 2xx, 3xx, and each 4xx that a retry won't better."""
    return 200 <= status < 500 and status not in HTTP_NOT_FINAL


def is_final_grpc(code: int) -> bool:
    """Tell whether a gRPC code is an answer to keep."""
    return code in GRPC_FINAL


REQUEST_ID = "x-request-id"
CORRELATION_ID = "x-correlation-id"
# Source: W3C Trace Context, 3.2 and 3.3.
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
# Milliseconds that the caller still waits. Relative, like gRPC's own timeout, since no two machines' clocks agree; no
# standard names one for HTTP. Source: "gRPC over HTTP2", Requests, Timeout.
REQUEST_TIMEOUT = "x-request-timeout-ms"
# Source: draft-ietf-httpapi-idempotency-key-header-07, 2.
IDEMPOTENCY_KEY = "idempotency-key"
REPLAYED = "x-idempotent-replayed"
RETRY_AFTER = "retry-after"
# Source: gRFC A6; an ASCII int32 of milliseconds, negative for "do not retry".
RETRY_PUSHBACK = "grpc-retry-pushback-ms"
LIMIT = "x-ratelimit-limit"
REMAINING = "x-ratelimit-remaining"
RESET = "x-ratelimit-reset"
# Source: draft-ietf-httpapi-ratelimit-headers-11, 3 and 4.
RATELIMIT = "ratelimit"
RATELIMIT_POLICY = "ratelimit-policy"

API_KEY = "x-api-key"

SENT = frozenset({API_KEY, CORRELATION_ID, IDEMPOTENCY_KEY, REQUEST_ID, REQUEST_TIMEOUT, TRACEPARENT, TRACESTATE})
"""Names that nearly every call is asked for."""

OURS = frozenset(
    {
        REQUEST_ID,
        CORRELATION_ID,
        REPLAYED,
        RETRY_AFTER,
        RETRY_PUSHBACK,
        LIMIT,
        REMAINING,
        RESET,
        RATELIMIT,
        RATELIMIT_POLICY,
    }
)
"""Names that are told anew for each call, hence never kept in a stored reply."""


def policy_field(quotas: Sequence[tuple[str, Quota]]) -> str:
    """Render ``ratelimit-policy``: a list of named quotas with limit and window.

    Source: draft-ietf-httpapi-ratelimit-headers-11, 3. ``w`` is a whole number of seconds, hence rounded up.
    """
    return ", ".join(f'"{name}";q={quota.limit};{_unit(quota)}' for name, quota in quotas)


def _unit(quota: Quota) -> str:
    return 'qu="concurrent-requests"' if quota.algorithm == "concurrency" else f"w={ceil(quota.per)}"


def usage_field(usages: Sequence[tuple[str, Usage]]) -> str:
    """Render ``ratelimit``: what each named quota has left, and the seconds until it has more.

    Source: draft-ietf-httpapi-ratelimit-headers-11, 4.
    """
    return ", ".join([usage_item(name, usage) for name, usage in usages])


def usage_item(name: str, usage: Usage) -> str:
    """Render one member of ``usage_field``: all of it, where a call has one rule."""
    return f'"{name}";r={usage.remaining};t={ceil(usage.reset_after)}'


def whole_seconds(retry_after: float) -> int:
    """Round a wait up to the whole seconds that ``retry-after`` counts in; at least 1.

    Less than half a millisecond over is not worth a second: a wait of a whole window carries one microsecond more.
    """
    return max(1, ceil(retry_after - 0.0005))


def pushback_ms(reason: Reason, retry_after: float | None, *, cap: float = 30.0) -> int | None:
    """Tell a gRPC client when to retry: milliseconds, at least 1; -1 for never; None for nothing to say.

    0 is never sent: C-core clients hang on it until their deadline. A wait over ``cap`` seconds says never,
    because a client that sleeps that long inside one call is not what anybody asked for.

    Source: gRFC A6, "Pushback".
    """
    row = TABLE[reason]
    if row.retry == "never" or (retry_after is not None and retry_after > cap + 0.0005):
        return -1
    if row.retry == "changed" or retry_after is None:
        return None
    return max(1, ceil(retry_after * 1000))


def limit_fields(limits: Sequence[tuple[str, Quota, Usage]], policy: str | None = None) -> tuple[tuple[str, str], ...]:
    """Return what a reply says of its limits; the classic three speak of the rule that is nearest to its end.

    Args:
        limits: each rule's name, quota and answer; at least one.
        policy: the ``ratelimit-policy`` of just these rules, where it is known.
    """
    if policy is None:
        policy = policy_field([(name, quota) for name, quota, _ in limits])
    if len(limits) == 1:  # nearly every call
        name, _, tight = limits[0]
        reset = ceil(tight.reset_after)
        field = f'"{name}";r={tight.remaining};t={reset}'
    else:
        tight = min((usage for _, _, usage in limits), key=lambda usage: usage.slack)
        reset = ceil(tight.reset_after)
        field = usage_field([(name, usage) for name, _, usage in limits])
    return (
        (LIMIT, str(tight.limit)),
        (REMAINING, str(tight.remaining)),
        (RESET, str(reset)),
        (RATELIMIT_POLICY, policy),
        (RATELIMIT, field),
    )
