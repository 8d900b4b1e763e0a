"""Ground floor: who a call is counted for. Nothing a caller sends is used before it is bounded."""

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv6Address, ip_address

from resilience import wire
from resilience.call import Call
from resilience.context import RequestContext

# To read an address of IPv6 costs more than a whole limit. What is remembered is bounded in number and in length.
_REMEMBERED, _LONGEST_REMEMBERED = 1024, 64

Identify = Callable[[Call], str | None]
"""Finds the caller's identity in a call, or None where it shows none."""


def api_key(name: str = wire.API_KEY) -> Identify:
    """Identify callers by a secret they send as metadata; only a digest of it is ever kept.

    The secret is not verified here. Where anybody may make one up, add a rule by address as well.

    Args:
        name: the metadata's name, lower-case.
    """
    usual = name in wire.SENT

    def identify(call: Call) -> str | None:
        value = call.metadata.sent.get(name) if usual else call.metadata.get(name)
        return sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:32] if value else None

    return identify


def by_caller(call: Call, context: RequestContext | None, identify: Identify) -> str:
    """Name the caller: the authenticated user, else the identity, else the address.

    The name is unambiguous (``user:`` of tenant ``a`` never equals that of tenant ``b``) but for the store only: it
    may hold personal data, so it must not reach a log or a label.
    """
    if context is not None and context.user_id is not None:
        return by_user(context.user_id, context.tenant_id)
    identity = identify(call)
    if identity is not None:
        return f"id:{identity}"
    return by_address(call)


def by_user(user_id: str, tenant_id: str | None = None) -> str:
    """Name an authenticated user, as ``set_context_user`` names the one of a call."""
    tenant = tenant_id or ""
    return f"user:{len(tenant)}:{tenant}:{user_id}"


def by_address(call: Call) -> str:
    """Name the caller by its network address; one IPv6 /64 is one caller, since one customer owns all of it."""
    peer = call.peer
    if peer is None:
        return "addr:"
    return f"addr:{peer[:_LONGEST_REMEMBERED] if ':' not in peer else address_group(peer)}"


def address_group(address: str) -> str:
    """Return what an address is counted as: IPv4 whole (mapped into IPv6 or not), IPv6 by its /64.

    What is no address (a host name that a test client reports) counts as itself, cut to 64 characters.
    """
    if ":" not in address:
        return address[:64]
    return _remembered(address) if len(address) <= _LONGEST_REMEMBERED else _group(address)


def _group(address: str) -> str:
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"


_remembered = lru_cache(_REMEMBERED)(_group)
