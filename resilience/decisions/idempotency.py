"""Ground floor: the life of one idempotency record, as decisions over values.

    absent --claim--> in progress --complete--> completed --ttl--> absent
                        |   ^ renew
                        |   +-- claim again once the lease is out: takeover, epoch + 1
                        +-- release --> absent

Facts
- A record outlives its lease: after a crash the fingerprint still guards the key, and the epoch tells the
  second owner that it is the second.
- A claim, a completion and a renewal with the owner's own token succeed again: a command that a driver repeats
  never meets itself.
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


@dataclass(slots=True)
class Record:
    """What a store keeps under one record key.

    Args:
        token: who owns it.
        epoch: 1 for the first owner, one more for each takeover.
        fingerprint: of the payload that the first owner brought.
        lease_until: the instant after which the owner counts as gone; meaningless once ``done``.
        done: whether it completed.
        reply: the stored answer; None while in progress, or where the answer can't be shown again.
    """

    token: str
    epoch: int
    fingerprint: bytes
    lease_until: float
    done: bool = False
    reply: Reply | None = None


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


Claim = Claimed | InProgress | Completed | Mismatched | Abandoned


def decide_claim(
    record: Record | None, token: str, fingerprint: bytes, takeover: Takeover, lease: float, now: float
) -> Claim:
    """Tell what a claim meets. On ``Claimed`` the store writes the record that ``claimed`` returns.

    Args:
        record: what the store holds and has not expired, or None.
        token: the claimant's, unique to this attempt of the call.
        takeover: what happens to a record whose lease is out.
        lease: seconds, only to cap the hint to a twin.
        now: seconds on the store's clock.
    """
    if record is None:
        return Claimed(1)
    if differs(record.fingerprint, fingerprint):
        return Mismatched()
    if record.done:
        return Completed(record.reply)
    if record.token == token:
        return Claimed(record.epoch)
    if now < record.lease_until:
        return InProgress(min(record.lease_until - now, lease, LONGEST_HINT))
    return Abandoned() if takeover == "refuse" else Claimed(record.epoch + 1)


def claimed(token: str, epoch: int, fingerprint: bytes, lease: float, now: float) -> Record:
    """Return the record of a claim that ``decide_claim`` granted."""
    return Record(token, epoch, fingerprint, now + lease)


Step = Literal["complete", "renew", "release"]


def may(step: Step, record: Record | None, token: str) -> bool:
    """Tell whether the holder of ``token`` may take ``step`` on ``record``: the fence against a stalled owner.

    A lost record (None) may still be completed, which restores it: better a late record than a second run.
    """
    if record is None:
        return step == "complete"
    return record.token == token and (not record.done or step == "complete")


def differs(first: bytes, second: bytes) -> bool:
    """Tell whether two fingerprints of one door differ; those of different doors say nothing of each other."""
    return first != second and first.partition(b":")[0] == second.partition(b":")[0]
