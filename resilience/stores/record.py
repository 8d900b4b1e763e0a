"""Floor 1: an idempotency record as bytes. One layout, read here and by the scripts in ``lua/``.

    I | P, D or R | epoch 8 | span in ms 8 | life in ms 8 | token 16 | length 1 | fingerprint | envelope

``P`` is in progress, ``D`` is done, ``R`` is released after a takeover: of that only the epoch counts. Life is what the
key's time to live was when this was written, so that what has gone of it is the record's age; span is how much of it
the state lasts: the lease of one in progress, the ttl of one that is done. Where the life of a done one is longer than
that, the rest is its tombstone.

The envelope of a done record is empty where the reply can't be shown again, else a line of JSON (version, protocol,
code, metadata, bytes of the body and of the operation's own result), the body as it was sent, and that result. What is
compressed or sealed in its place is described in ``sealing``.
"""

import json
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from resilience.verdict import Reply

_HEAD = Struct(">c c Q Q Q 16s B")
_WRITER = json.JSONEncoder(separators=(",", ":"))
_VERSION = 2


class Stored(NamedTuple):
    """A record, read.

    Args:
        done: whether it completed.
        epoch: of its owner.
        span: seconds of lease, or of ttl if done.
        life: seconds that the key had to live when it was written, at least ``span``.
        token: of its owner, 16 bytes.
        fingerprint: of the payload.
        reply: the kept answer, or None.
        released: whether its owner gave the key back.
    """

    done: bool
    epoch: int
    span: float
    life: float
    token: bytes
    fingerprint: bytes
    reply: Reply | None
    released: bool = False


def pack(
    *,
    done: bool,
    token: bytes,
    fingerprint: bytes,
    ttl: float,
    lease: float = 0.0,
    tombstone: float = 0.0,
    reply: Reply | None = None,
    seal: Callable[[bytes], bytes] = bytes,
) -> bytes:
    """Return the bytes of a record of epoch 1: one with a lease, or a done one with a reply and a tombstone.

    Args:
        seal: returns what to keep of an envelope.
    """
    state, span = (b"D", ttl) if done else (b"P", lease)
    head = _HEAD.pack(b"I", state, 1, to_ms(span), to_ms(ttl + tombstone), token, len(fingerprint))
    return head + fingerprint + (b"" if reply is None else seal(_envelope(reply)))


def to_ms(seconds: float) -> int:
    """Return whole milliseconds: the record and the key's expiry must agree to each of them."""
    return round(seconds * 1000)


def unpack(raw: bytes, unseal: Callable[[bytes], bytes | None] = bytes) -> Stored | None:
    """Read a record; None where the bytes are no record.

    An envelope of another version, or one that was cut short, counts as not replayable.

    Args:
        unseal: returns the envelope that ``seal`` was given, or None where that can't be had.
    """
    if len(raw) < _HEAD.size or raw[:1] != b"I" or raw[1:2] not in (b"P", b"D", b"R"):
        return None
    _, state, epoch, span, life, token, length = _HEAD.unpack_from(raw)
    envelope = _HEAD.size + length
    if len(raw) < envelope:
        return None
    kept = raw[envelope:]
    opened = unseal(kept) if kept else None
    reply = _reply(opened) if opened else None
    print_ = raw[_HEAD.size : envelope]
    return Stored(state == b"D", epoch, span / 1000, life / 1000, token, print_, reply, state == b"R")


def _envelope(reply: Reply) -> bytes:
    result = None if reply.result is None else len(reply.result)
    told = [_VERSION, reply.protocol, reply.code, reply.metadata, len(reply.body), result]
    return _WRITER.encode(told).encode() + b"\n" + reply.body + (reply.result or b"")


def _reply(envelope: bytes) -> Reply | None:
    meta, _, parts = envelope.partition(b"\n")
    try:
        version, protocol, code, metadata, length, rest = json.loads(meta)
        pairs = tuple((name, value) for name, value in metadata)
        whole = version == _VERSION and length + (rest or 0) == len(parts)
    except (ValueError, TypeError, RecursionError):
        return None
    return Reply(protocol, code, pairs, parts[:length], None if rest is None else parts[length:]) if whole else None
