"""Floor 4: verdicts as gRPC. Every code comes from ``wire.TABLE``; every end is an ``abort``.

An abort sends no initial metadata: a client that got response headers is committed and may not retry.
Source: gRFC A6, "When Retries are Valid".
"""

from collections.abc import Iterable
from typing import NoReturn

import grpc

from grpc_interceptors.context import GuardedContext
from grpc_interceptors.details import reject_details
from grpc_interceptors.trailers import STATUS_DETAILS
from resilience import wire
from resilience.admission import Admission
from resilience.verdict import Reject, Reply

CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


async def render_reject(reject: Reject, admission: Admission, context: GuardedContext) -> NoReturn:
    """Refuse the RPC; tell the client why, and when a retry is worth while."""
    if reject.retry_after is not None:
        admission.metadata.append((wire.RETRY_AFTER, str(wire.whole_seconds(reject.retry_after))))
    pushback = wire.pushback_ms(reject.reason, reject.retry_after)
    if pushback is not None:
        admission.metadata.append((wire.RETRY_PUSHBACK, str(pushback)))
    details = (STATUS_DETAILS, reject_details(reject, admission))
    await context.refuse(CODES[wire.TABLE[reject.reason].grpc], reject.message, (details,))


async def render_error_reply(reply: Reply, context: GuardedContext) -> NoReturn:
    """Send a stored status that was not OK again."""
    await context.abort(CODES[reply.code], reply.body.decode("utf-8", "replace"), replayed_trailers(reply))


def kept_trailers(trailers: Iterable[tuple[str, str | bytes]]) -> tuple[tuple[str, str], ...]:
    """Return the trailers of a reply that its retries may see again; binary ones as latin-1 text."""
    return tuple(
        (name, value.decode("latin-1") if isinstance(value, bytes) else value)
        for name, value in trailers
        if name not in wire.OURS
    )


def replayed_trailers(reply: Reply) -> tuple[tuple[str, str | bytes], ...]:
    """Return stored trailers as they were sent first."""
    return tuple((name, value.encode("latin-1") if name.endswith("-bin") else value) for name, value in reply.metadata)
