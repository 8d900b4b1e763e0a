"""Render docs/wire.md from the one table in ``resilience.wire``. Run it with ``./dev docs``."""

import sys

from resilience import wire
from resilience.wire import TABLE, Reason

MEANING = {
    Reason.RATE_LIMITED: "the caller's quota is used up",
    Reason.IDEMPOTENCY_KEY_MISSING: "the operation needs a key",
    Reason.IDEMPOTENCY_KEY_MALFORMED: "the key is not 1 to 255 visible ASCII characters, came twice, or with a stream",
    Reason.IDEMPOTENCY_IN_PROGRESS: "a twin runs; ask again for its reply",
    Reason.IDEMPOTENCY_PAYLOAD_MISMATCH: "the key was used with another request",
    Reason.IDEMPOTENCY_NOT_REPLAYABLE: "it is done, but its reply can't be shown here",
    Reason.IDEMPOTENCY_ABANDONED: "the worker that ran it vanished, and the policy is not to run it again",
    Reason.PAYLOAD_TOO_LARGE: "a keyed request is over the bound",
    Reason.DRAINING: "the service is about to stop",
    Reason.STORE_UNAVAILABLE: "the store is gone, and the policy is to refuse",
}
RETRY = {"after": "later, as told", "changed": "another call only", "never": "never (pushback -1)"}
NAMES = (
    (wire.REQUEST_ID, "the id of this hop, minted here"),
    (wire.CORRELATION_ID, "the id of the whole chain: the caller's, or new"),
    (wire.IDEMPOTENCY_KEY, "sent by the client"),
    (wire.REQUEST_TIMEOUT, "sent by the client: milliseconds it will still wait"),
    (wire.REPLAYED, "`true` on a stored reply"),
    (wire.RETRY_AFTER, "whole seconds"),
    (wire.RETRY_PUSHBACK, "gRPC only: milliseconds, or -1"),
    (wire.LIMIT, "units per window of the tightest rule"),
    (wire.REMAINING, "units left"),
    (wire.RESET, "whole seconds until there are more"),
    (wire.RATELIMIT, "every rule: `r` units left, `t` seconds until more"),
    (wire.RATELIMIT_POLICY, "every rule: `q` units per `w` seconds"),
)


def main() -> None:
    """Write the page to standard output."""
    rows = (
        f"| `{reason.value}` | {MEANING[reason]} | {row.http} | {row.grpc_name} ({row.grpc}) | {RETRY[row.retry]} |\n"
        for reason, row in TABLE.items()
    )
    names = (f"| `{name}` | {meaning} |\n" for name, meaning in NAMES)
    sys.stdout.write(
        "# What leaves through the doors\n\n"
        "Rendered from `resilience/wire.py` by `./dev docs`; both doors read the same table.\n\n"
        "## Refusals\n\n"
        "| reason | meaning | HTTP | gRPC | retry |\n|---|---|---|---|---|\n"
        f"{''.join(rows)}\n"
        'An HTTP refusal is `{"detail": ..., "retry_after": ...}`; a client that accepts `application/problem+json`\n'
        "gets RFC 9457 problem details with the reason as `code`. A gRPC refusal is an `abort` without initial\n"
        "metadata, so that gRPC's own retries stay possible.\n\n"
        "## Names\n\n"
        "Headers over HTTP, trailers over gRPC.\n\n"
        "| name | value |\n|---|---|\n"
        f"{''.join(names)}\n"
        "## Which answers are kept\n\n"
        "Under an idempotency key, these are final and replayed; all others free the key, so that a retry runs.\n\n"
        f"- HTTP: 200 to 499, but {', '.join(str(code) for code in sorted(wire.HTTP_NOT_FINAL))}.\n"
        f"- gRPC: {', '.join(str(code) for code in sorted(wire.GRPC_FINAL))} (OK, INVALID_ARGUMENT, NOT_FOUND, "
        "ALREADY_EXISTS, FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED).\n"
    )


if __name__ == "__main__":
    main()
