"""Ground floor: keys, and what a command meets under one.

    absent --claim--> in progress --complete--> completed --ttl--> absent, or expired --tombstone--> absent
                        |   ^ renew
                        |   +-- claim again once the lease is out: takeover, epoch + 1
                        +-- release --> absent, or after a takeover: released --claim--> in progress, epoch + 1

The machine itself is the table of ``decisions.idempotency_table``; this reads it.

Facts
- A record outlives its lease: after a crash the fingerprint still guards the key, and the epoch tells the
  second owner that it is the second. While the first may still be there no epoch comes again, whoever fails.
- A claim, a completion, a renewal and a resolution succeed again when they are repeated: a command that a driver
  sends twice never meets itself.
- A payload mismatch is told before everything else, during the first run and after it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Literal
from uuid import UUID

from resilience.decisions.idempotency_record import Record, next_epoch, state_of
from resilience.decisions.idempotency_table import Command, Row, find_row
from resilience.verdict import Reply

# Visible ASCII without the quote and the backslash that would need escapes.
# Source: draft-ietf-httpapi-idempotency-key-header-07, 2.1; RFC 8941, 3.3.3 (String).
_KEY = re.compile(r'"([\x21\x23-\x5b\x5d-\x7e]{1,255})"|([\x21\x23-\x5b\x5d-\x7e]{1,255})')

_TELLING = (str, int, float, bool, bytes, Decimal, UUID, date, datetime)

LONGEST_HINT = 5.0
"""Seconds: the longest a twin is asked to wait, however much lease is left."""


def accept_key(values: Sequence[str]) -> str | None:
    """Return the key that a caller sent, or None where it is malformed or sent more than once.

    A key is 1 to 255 visible ASCII characters, bare or in the quotes of a structured-field string; both are one key.
    """
    match = _KEY.fullmatch(values[0]) if len(values) == 1 else None
    return (match[1] or match[2]) if match else None


def record_key(namespace: str, operation: str, caller: str, key: str) -> str:
    """Return the store key of one operation by one caller: 64 hex digits, whatever the four parts hold."""
    digest = sha256()
    for part in (namespace, operation, caller, key):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def generate_idempotency_key(*parts: str | float | bool | bytes | Decimal | UUID | date | None) -> str:
    """Return a key that follows from an operation's parameters: the same parts give the same key, in any process.

    Parts of different types or in another order give another key: ``("a", "bc")`` is not ``("ab", "c")``, and
    ``1`` is neither ``"1"`` nor ``1.0`` nor ``True``.

    Args:
        parts: at least one. Name the operation first.

    Returns:
        64 hex digits.

    Raises:
        TypeError: a part is of a type whose text is not the same in every process, or there is none.
    """
    if not parts:
        raise TypeError("An idempotency key needs at least one part; name the operation first.")
    digest = sha256()
    for part in parts:
        if part is not None and type(part) not in _TELLING:
            known = "text, bytes, a number, a date, a UUID or None"
            raise TypeError(f"A part of an idempotency key is {known}, not {type(part).__name__}.")
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{type(part).__name__}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


Takeover = Literal["reexecute", "refuse"]


@dataclass(frozen=True, slots=True)
class Claimed:
    """The caller owns the key and must run the operation."""

    epoch: int


@dataclass(frozen=True, slots=True)
class InProgress:
    """Somebody else runs it; ask again after ``retry_after`` seconds."""

    retry_after: float


@dataclass(frozen=True, slots=True)
class Completed:
    """It ran. ``reply`` is None where the answer was too large or unfit to keep."""

    reply: Reply | None


@dataclass(frozen=True, slots=True)
class Mismatched:
    """The key was used with another payload."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Its owner vanished mid-way, and the policy is not to run it again."""


@dataclass(frozen=True, slots=True)
class Expired:
    """It ran, so long ago that its answer is no longer kept; only the key is remembered."""


Claim = Claimed | InProgress | Completed | Mismatched | Abandoned | Expired

_MISMATCHED, _ABANDONED, _EXPIRED = Mismatched(), Abandoned(), Expired()


def decide_claim(
    record: Record | None, token: str, fingerprint: bytes, takeover: Takeover, lease: float, now: float
) -> Claim:
    """Tell what a claim meets. On ``Claimed`` the store writes the record that ``claimed`` returns.

    Args:
        record: what the store holds and has not run out, or None.
        token: the claimant's, unique to this attempt of the call.
        takeover: what happens to a record whose lease is out.
        lease: seconds, only to cap the hint to a twin.
        now: seconds on the store's clock.
    """
    if record is None:
        return Claimed(next_epoch(find_row("claim", "absent"), None))
    row = find_row(
        "claim",
        state_of(record, now),
        owner=record.token == token,
        same_payload=not differs(record.fingerprint, fingerprint),
        takeover=takeover,
    )
    match row.answer:
        case "claimed":
            return Claimed(next_epoch(row, record))
        case "in_progress":
            return InProgress(min(record.lease_until - now, lease, LONGEST_HINT))
        case "completed":
            return Completed(record.reply)
        case "mismatched":
            return _MISMATCHED
        case "expired":
            return _EXPIRED
        case _:
            return _ABANDONED


def decide_step(command: Command, record: Record | None, token: str, now: float) -> Row:
    """Tell what any other command meets: the fence against a stalled owner, and the bounds of an operator's power.

    Args:
        command: any but ``claim``.
        record: what the store holds and has not run out, or None.
        token: whose command it is; an operator's resolution has the token that ``resolution`` returns.
        now: seconds on the store's clock.

    Returns:
        A row whose ``answer`` is ``yes`` or ``no``; where its ``then`` is None, nothing is to be written.
    """
    if record is None:
        return find_row(command, "absent")
    return find_row(command, state_of(record, now), owner=record.token == token, later=record.epoch > 1)


def differs(first: bytes, second: bytes) -> bool:
    """Tell whether two fingerprints of one door differ; those of different doors say nothing of each other."""
    return first != second and first.partition(b":")[0] == second.partition(b":")[0]
