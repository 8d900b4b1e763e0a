"""Floor 1: an idempotency record as bytes. One layout, read here and by the scripts in ``lua/``.

    I | P or D | epoch 8 | lease in ms 4 | ttl in ms 8 | token 16 | length 1 | fingerprint | envelope

``P`` is in progress, ``D`` is done. The envelope of a done record is empty where the reply can't be shown again, else a
line of JSON (version, protocol, code, metadata) and the body as it was sent.
"""

import json
from struct import Struct
from typing import NamedTuple

from resilience.verdict import Reply

_HEAD = Struct(">c c Q I Q 16s B")
_VERSION = 1


class Stored(NamedTuple):
    """A record, read.

    Args:
        done: whether it completed.
        epoch: of its owner.
        token: of its owner, 16 bytes.
        fingerprint: of the payload.
        reply: the kept answer, or None.
    """

    done: bool
    epoch: int
    token: bytes
    fingerprint: bytes
    reply: Reply | None


def pack(*, done: bool, lease: float, ttl: float, token: bytes, fingerprint: bytes, reply: Reply | None) -> bytes:
    """Return the bytes of a record of epoch 1."""
    state = b"D" if done else b"P"
    head = _HEAD.pack(b"I", state, 1, round(lease * 1000), round(ttl * 1000), token, len(fingerprint))
    return head + fingerprint + (b"" if reply is None else _envelope(reply))


def unpack(raw: bytes) -> Stored | None:
    """Read a record; None where the bytes are no record. An envelope of another version counts as not replayable."""
    if len(raw) < _HEAD.size or raw[:1] != b"I" or raw[1:2] not in (b"P", b"D"):
        return None
    _, state, epoch, _, _, token, length = _HEAD.unpack_from(raw)
    envelope = _HEAD.size + length
    if len(raw) < envelope:
        return None
    if len(raw) < envelope:
        return None
    return Stored(state == b"D", epoch, token, raw[_HEAD.size : envelope], _reply(raw[envelope:]))


def _envelope(reply: Reply) -> bytes:
    meta = json.dumps([_VERSION, reply.protocol, reply.code, reply.metadata], separators=(",", ":"))
    return meta.encode() + b"\n" + reply.body


def _reply(envelope: bytes) -> Reply | None:
    meta, _, body = envelope.partition(b"\n")
    try:
        version, protocol, code, metadata = json.loads(meta)
        pairs = tuple((name, value) for name, value in metadata)
    except (ValueError, TypeError):
        return None
    return Reply(protocol, code, pairs, body) if version == _VERSION else None
