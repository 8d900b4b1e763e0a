"""Ground floor: what makes two payloads the same request."""

import json
from hashlib import sha256
from typing import Any

from resilience.call import Protocol


def fingerprint(protocol: Protocol, resource: str, payload: bytes) -> bytes:
    """Return ``<protocol>:`` and a SHA-256 over the resource and the canonical payload.

    Metadata never counts: a retry carries another request id. JSON counts by its value, so that a client that
    writes members in another order is not told it changed its mind; all else counts by its bytes.

    Args:
        resource: path values and query; what the operation's name leaves open.
    """
    target = resource.encode("utf-8", "surrogatepass")
    digest = sha256(len(target).to_bytes(8, "big") + target)
    digest.update(canonical(payload))
    return protocol.encode() + b":" + digest.digest()


def canonical(payload: bytes) -> bytes:
    """Return JSON with sorted members and no spaces; any other payload as it is.

    A number with a fraction counts by its text, since a decimal may hold what a float can't; an object that
    names a member twice counts by its bytes, since parsers differ on which one holds.
    """
    if payload.lstrip()[:1] not in (b"{", b"["):
        return payload
    try:
        value = json.loads(payload, parse_float=_as_text, object_pairs_hook=_members)
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return payload


def _as_text(number: str) -> str:
    return "\0" + number


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError
    return members
