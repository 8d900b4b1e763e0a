"""Floor 4: whose address counts as the caller's, where proxies stand in front."""

from collections.abc import Sequence
from functools import lru_cache
from typing import get_args

from starlette.types import Scope

from resilience.decisions.forwarded import MOST_HOPS, ChainHeader, TrustedProxies, find_by_count, read_hops
from resilience.errors import ConfigurationError

# Callers can fill what is remembered with what they send: at most this many answers, each to so many characters.
_REMEMBERED = 1024
_REMEMBERED_CHARACTERS = 512


class ClientAddress:
    """Finds a caller's address in what one's own proxies report of it, and believes nobody else.

    Say either which proxies are yours, ``ClientAddress(trusted=("10.0.0.0/8",))``, or how many of them every request
    comes through, ``ClientAddress(hops=2)``. The first is checked against the connection; the second is not, so use
    it only where nobody reaches the application but through all of these proxies.

    The server must leave the address of the connection as it is: uvicorn has a reader of its own for
    ``X-Forwarded-For``, which ``--no-proxy-headers`` switches off.

    Args:
        trusted: networks and addresses of your proxies, and of nobody else: whoever calls from there may claim to be
            anyone. ``"unix"`` is a proxy that connects over a unix socket.
        hops: how many proxies, 1 to 64. The address is that many places from the right; where the chain is
            shorter, or that place holds no address, the connection's own address counts.
        header: the one header that these proxies write; the other is ignored.

    Raises:
        ConfigurationError: neither or both of ``trusted`` and ``hops`` are given, one is wrong, or ``trusted`` is
            everybody.
    """

    def __init__(
        self,
        *,
        trusted: Sequence[str] | None = None,
        hops: int | None = None,
        header: ChainHeader = "x-forwarded-for",
    ) -> None:
        if (trusted is None) == (hops is None):
            raise ConfigurationError(
                'ClientAddress needs either trusted=("10.0.0.0/8",), the networks of your proxies, '
                "or hops=1, how many of them stand in front; not both."
            )
        if hops is not None and not 1 <= hops <= MOST_HOPS:
            raise ConfigurationError(f"hops must be 1 to {MOST_HOPS}, not {hops}. Without a proxy, leave it out.")
        if header not in get_args(ChainHeader):
            raise ConfigurationError(f'header must be "x-forwarded-for" or "forwarded", not "{header}".')
        self._header: ChainHeader = header
        self._name = header.encode()
        self._hops = hops or 0
        self._proxies = None if trusted is None else TrustedProxies(trusted)
        self._remembered = lru_cache(_REMEMBERED)(self._find)

    def peer(self, scope: Scope) -> str | None:
        """Return the caller's address, without a port or a zone; None is an unknown caller at a unix socket.

        Where no proxy's word is taken it is the connection's own, as the server tells it.
        """
        lines = [value for name, value in scope["headers"] if name == self._name]
        text = b",".join(lines).decode("latin-1")
        find = self._remembered if len(text) <= _REMEMBERED_CHARACTERS else self._find
        return find(direct_peer(scope), text)

    def _find(self, peer: str | None, text: str) -> str | None:
        hops = read_hops(self._header, text)
        if self._proxies is None:
            return find_by_count(peer, hops, self._hops)
        return self._proxies.find(peer, hops)


def direct_peer(scope: Scope) -> str | None:
    """Return the address at the other end of the connection, be it a proxy's; None is a unix socket's."""
    client = scope.get("client")
    return client[0] if client else None
