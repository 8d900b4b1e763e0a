"""Ground floor: what makes two payloads the same request."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from operator import itemgetter
from typing import Any
from uuid import UUID

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
        text = payload.decode(json.detect_encoding(payload), "surrogatepass")
        return _WRITER.encode(_READER.decode(text)).encode()
    except (ValueError, RecursionError):
        return payload


def _as_text(number: str) -> str:
    return "\0" + number


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError
    return members


# Made once: to make them takes as long as to read and write a small payload.
_READER = json.JSONDecoder(parse_float=_as_text, object_pairs_hook=_members)
_WRITER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def fingerprint_of_values(values: Any) -> bytes:
    """Return a SHA-256 over the values that an operation is called with, the same in every process.

    Values of different types differ, and so do containers of the same parts cut otherwise; the order of a mapping's
    members does not count.

    Args:
        values: text, bytes, numbers, truths, None, dates, UUIDs, enumerations; lists, tuples, mappings and dataclasses
            of these; protobuf messages and pydantic models.

    Raises:
        TypeError: a value is of another type, whose text need not be the same in every process.
    """
    digest = sha256()
    _feed(values, digest.update)
    return digest.digest()


def _feed(value: Any, feed: Callable[[bytes], None]) -> None:
    if isinstance(value, Enum):
        value = value.value
    if type(value) in _PLAIN:
        _feed_part(type(value).__name__, value if isinstance(value, bytes) else str(value).encode(*_ANY_TEXT), feed)
    elif isinstance(value, list | tuple):
        _feed_part("list", str(len(value)).encode(), feed)
        for part in value:
            _feed(part, feed)
    elif isinstance(value, Mapping):
        members = sorted(((fingerprint_of_values(name), part) for name, part in value.items()), key=itemgetter(0))
        _feed_part("mapping", str(len(members)).encode(), feed)
        for name, part in members:
            feed(name)
            _feed(part, feed)
    elif is_dataclass(value) and not isinstance(value, type):
        _feed({part.name: getattr(value, part.name) for part in fields(value)}, feed)
    elif hasattr(value, "SerializeToString"):
        _feed_part("message", value.SerializeToString(deterministic=True), feed)
    elif hasattr(value, "model_dump"):
        _feed(value.model_dump(), feed)
    else:
        raise TypeError(f"A {type(value).__name__} need not look the same in every process.")


def _feed_part(kind: str, data: bytes, feed: Callable[[bytes], None]) -> None:
    feed(f"{kind}:{len(data)}:".encode())
    feed(data)


_PLAIN = frozenset({str, bytes, int, float, bool, type(None), Decimal, UUID, date, datetime, time, timedelta})
_ANY_TEXT = ("utf-8", "surrogatepass")
