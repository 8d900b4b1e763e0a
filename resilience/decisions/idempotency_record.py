"""Ground floor: an idempotency record as values, and what can be told of it at an instant."""

from dataclasses import dataclass
from hashlib import sha256
from math import inf

from resilience.decisions.idempotency_table import Row, State
from resilience.verdict import Reply


@dataclass(slots=True)
class Record:
    """What a store keeps under one record key. Instants are seconds on the store's clock.

    Args:
        token: who owns it.
        epoch: 1 for the first owner, one more for each takeover.
        fingerprint: of the payload that the first owner brought.
        lease_until: when the owner counts as gone; meaningless once ``done``.
        done: whether it completed.
        reply: the stored answer; None while in progress, or where the answer can't be shown again.
        written_at: when it was claimed, renewed, completed, released or resolved, whichever was last.
        ttl_until: when its reply, or what an owner left unfinished or gave back, is no longer kept.
        released: whether its owner gave the key back; then only the epoch means anything.
    """

    token: str
    epoch: int
    fingerprint: bytes
    lease_until: float
    done: bool = False
    reply: Reply | None = None
    written_at: float = 0.0
    ttl_until: float = inf
    released: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """What an operator is shown of a record. Times are seconds.

    Args:
        state: ``in_progress``; ``abandoned``: its owner's lease is out; ``completed``; ``expired``: it ran, and the key
            is remembered without its reply; ``released``: who took over gave it back, and the next claim runs.
        epoch: how many owners it had, a resolution counted as one.
        age: since it was claimed, renewed, completed, released or resolved, whichever was last.
        lease_left: until its owner counts as gone; 0 unless in progress.
        ttl_left: until its reply, or what an owner left unfinished or gave back, is no longer kept; 0 once expired.
        tombstone_left: that the key will be remembered after that.
        reply: what a retry is answered; None unless completed, or where the answer can't be shown again.
    """

    state: State
    epoch: int
    age: float
    lease_left: float
    ttl_left: float
    tombstone_left: float
    reply: Reply | None


def state_of(record: Record | None, now: float) -> State:
    """Tell the state of what a store holds, or of None where it holds nothing or that has run out."""
    if record is None:
        return "absent"
    if record.released:
        return "released"
    if record.done:
        return "completed" if now < record.ttl_until else "expired"
    return "in_progress" if now < record.lease_until else "abandoned"


def stand(record: Record, gone_at: float, now: float) -> Standing:
    """Tell an operator how ``record`` stands; at ``gone_at`` the store will hold nothing of it."""
    state = state_of(record, now)
    return Standing(
        state,
        record.epoch,
        age=now - record.written_at,
        lease_left=record.lease_until - now if state == "in_progress" else 0.0,
        ttl_left=max(0.0, record.ttl_until - now),
        tombstone_left=gone_at - max(now, record.ttl_until),
        reply=record.reply if state == "completed" else None,
    )


def claimed(token: str, epoch: int, fingerprint: bytes, *, lease: float, ttl: float, now: float) -> Record:
    """Return the record of a claim that was granted."""
    return Record(token, epoch, fingerprint, now + lease, written_at=now, ttl_until=now + ttl)


def completed(token: str, epoch: int, fingerprint: bytes, reply: Reply | None, *, ttl: float, now: float) -> Record:
    """Return the record of a completion or a resolution that was accepted."""
    return Record(token, epoch, fingerprint, now, done=True, reply=reply, written_at=now, ttl_until=now + ttl)


def released(record: Record, now: float) -> Record:
    """Return the record that a release leaves of ``record``: its epoch, for one more ttl."""
    until = now + record.ttl_until - record.written_at
    return Record(record.token, record.epoch, b"", until, written_at=now, ttl_until=until, released=True)


def next_epoch(row: Row, record: Record | None) -> int:
    """Return the epoch of what is written where ``row`` holds."""
    if row.epoch == "first" or record is None:
        return 1
    return record.epoch + 1 if row.epoch == "raised" else record.epoch


def resolution(reply: Reply | None) -> str:
    """Return the token of an operator who answers with ``reply``.

    The same for the same answer, so that a resolution that is sent twice does not meet itself.
    """
    if reply is None:
        return "resolved"
    told = repr((reply.protocol, reply.code, reply.metadata)).encode("utf-8", "surrogatepass")
    return f"resolved:{sha256(len(told).to_bytes(8, 'big') + told + reply.body).hexdigest()}"
