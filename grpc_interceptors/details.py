"""Floor 4: what a refusal says to programs: ``google.rpc`` details beside the status, as a binary trailer.

Source: google/rpc/error_details.proto and status.proto; AIP-193.
"""

from functools import lru_cache
from math import inf
from typing import Any

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from grpc_interceptors.room import MOST_BYTES, encoded, fit_limits, size
from grpc_interceptors.trailers import STATUS_DETAILS
from resilience import wire
from resilience.admission import Admission
from resilience.verdict import Reject

DOMAIN = "grpc-http-resilience"
"""Whose reasons these are, in each ``ErrorInfo``; stable, like the reasons themselves."""

_KEY_REASONS = frozenset({wire.Reason.IDEMPOTENCY_KEY_MISSING, wire.Reason.IDEMPOTENCY_KEY_MALFORMED})


def reject_details(reject: Reject, admission: Admission) -> bytes:
    """Return the serialised ``google.rpc.Status`` of a refusal, with the same code and message as the RPC's own.

    - ``ErrorInfo``, always: the reason in upper case. Its metadata is empty: nothing the client sent is in here.
    - ``RetryInfo`` where the same call can succeed later: the wait, in whole milliseconds rounded up, at least 1.
      Unlike a pushback it is told however long it is.
    - ``QuotaFailure``: each rule that denied, by its name, while all trailers fit in 1 KB.
    - ``BadRequest`` where the key itself is at fault.

    The lists of limits in the admission's metadata are cut to the room that these leave.
    """
    # Encodings of parts of one message, one after the other, encode the whole: what never changes is made once.
    told = _fixed(reject.reason, reject.message)
    wait = wire.pushback_ms(reject.reason, reject.retry_after, cap=inf)
    if wait is not None and wait > 0:
        told += _detail(RetryInfo(retry_delay=Duration(seconds=wait // 1000, nanos=wait % 1000 * 1_000_000)))
    fixed = len(STATUS_DETAILS) + encoded(len(told))
    fit_limits(admission, fixed)
    if reject.reason is wire.Reason.RATE_LIMITED:
        told += _quota_failure(admission, MOST_BYTES - fixed - size(admission.metadata))
    return told


def _quota_failure(admission: Admission, room: int) -> bytes:
    """Return as many violations as fit in ``room`` bytes of a trailer, or nothing where not one does."""
    violations: list[Any] = []
    kept = b""
    for name, quota, usage in admission.limits:
        if usage.allowed:
            continue
        violations.append(
            QuotaFailure.Violation(
                subject=name,
                description="Nothing is left of this limit",
                quota_metric="concurrent-requests" if quota.algorithm == "concurrency" else "requests",
                quota_id=name,
                quota_value=quota.limit,
            )
        )
        more = _detail(QuotaFailure(violations=violations))
        if encoded(len(more)) > room:
            break
        kept = more
    return kept


@lru_cache(256)
def _fixed(reason: wire.Reason, message: str) -> bytes:
    told: bytes = Status(code=wire.TABLE[reason].grpc, message=message).SerializeToString()
    told += _detail(ErrorInfo(reason=reason.name, domain=DOMAIN))
    if reason in _KEY_REASONS:
        fault = BadRequest.FieldViolation(field=wire.IDEMPOTENCY_KEY, description=message, reason=reason.name)
        told += _detail(BadRequest(field_violations=[fault]))
    return told


def _detail(message: Any) -> bytes:
    packed = Packed()
    packed.Pack(message)
    told: bytes = Status(details=[packed]).SerializeToString()
    return told
