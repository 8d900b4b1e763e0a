"""Ground floor: whose address a chain of proxies tells. Looks no address up, and never reads past a stranger's.

Each proxy adds, on the right, the address that its own caller came from. So what one's own proxies wrote stands on the
right, and all that a caller may have made up on the left of it: a chain is read from the right, to the first address
that is no proxy of one's own. Source: RFC 7239, 8.1.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from itertools import islice
from typing import Literal

from resilience.errors import ConfigurationError

Address = IPv4Address | IPv6Address
ChainHeader = Literal["x-forwarded-for", "forwarded"]

MOST_HOPS = 64
"""How many hops of a chain are looked at, from the right."""

MOST_CHARACTERS = 8192
"""How much of a chain is looked at, from the right."""

UNIX = "unix"
"""Names the peer of a unix socket, which has no address."""

# Source: RFC 7239, 6. A zone means nothing to anybody else, and a port says no more of who calls: both are dropped. An
# IPv6 address without its brackets is against the grammar, but common, and all there is in X-Forwarded-For.
_ZONE = r"(?:%[0-9A-Za-z._~%-]{1,64})?"
_PORT = r"(?::(?:[0-9]{1,5}|_[0-9A-Za-z._-]{1,64}))?"
_NODE = re.compile(rf"([0-9.]{{7,15}}){_PORT}|\[([0-9A-Fa-f:.]{{2,45}}){_ZONE}\]{_PORT}|([0-9A-Fa-f:.]{{2,45}}){_ZONE}")
_ESCAPED = re.compile(r"\\(.)")


class TrustedProxies:
    """The networks whose word about their own callers is taken.

    Args:
        entries: networks (``"10.0.0.0/8"``), single addresses, and ``"unix"`` for the peer of a unix socket.

    Raises:
        ConfigurationError: there is no entry, one is no network, or one is everybody.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        if isinstance(entries, str) or not entries:
            raise ConfigurationError(
                f'trusted must be a tuple of the networks of your proxies, such as ("10.0.0.0/8",), not {entries!r}. '
                "Where no proxy stands in front, leave it out: the address of the connection counts."
            )
        self._unix = UNIX in entries
        self._networks = tuple(_network(entry) for entry in entries if entry != UNIX)

    def trust(self, address: Address) -> bool:
        """Return whether an address, as ``parse_address`` returns it, is a proxy's."""
        return any(address in network for network in self._networks)

    def trust_peer(self, peer: str | None) -> bool:
        """Return whether the other end of a connection is a proxy; None is a unix socket's."""
        if peer is None:
            return self._unix
        address = parse_address(peer)
        return address is not None and self.trust(address)

    def find(self, peer: str | None, hops: Iterable[Address | None]) -> str | None:
        """Return the first address from the right that is no proxy's.

        The peer itself where it is no proxy, and where all hops are proxies': the left-most of these is what a caller
        would write who wants to pass for one. A hop that can't be read hides who stands behind it, so the proxy that
        reported it is the answer.

        Args:
            peer: the address at the other end of the connection, or None for a unix socket.
            hops: from the right, as ``read_hops`` reads them.
        """
        if not self.trust_peer(peer):
            return peer
        last = peer
        for hop in hops:
            if hop is None:
                return last
            last = str(hop)
            if not self.trust(hop):
                return last
        return peer


def find_by_count(peer: str | None, hops: Iterable[Address | None], count: int) -> str | None:
    """Return the ``count``-th address from the right; the peer where the chain is shorter, or that hop unreadable.

    A shorter chain has come past the proxies, so that all of it may be made up; the peer never is.

    Args:
        peer: the address at the other end of the connection, or None for a unix socket.
        hops: from the right, as ``read_hops`` reads them.
        count: how many proxies of one's own stand in front, from 1 on.
    """
    hop = next(islice(hops, count - 1, None), None)
    return peer if hop is None else str(hop)


def read_hops(header: ChainHeader, text: str) -> Iterator[Address | None]:
    """Read a chain from the right, hop by hop; None is a hop that names no address.

    That is ``unknown``, an obfuscated ``_name``, an empty or malformed hop, and one with no ``for`` or with two.
    What is further left than ``MOST_HOPS`` or ``MOST_CHARACTERS`` is as if it were not there.

    Source: RFC 7239, 4 to 6, for ``forwarded``; for ``x-forwarded-for``, what proxies send.

    Args:
        text: the lines of the header in the order sent, joined by commas.
    """
    for element in islice(_split(text, ","), MOST_HOPS):
        yield parse_address(element.strip(" \t") if header == "x-forwarded-for" else _node(element))


def parse_address(text: str) -> Address | None:
    """Return the address in ``1.2.3.4:80``, ``[2001:db8::1]:80`` or ``fe80::1%eth0``, else None.

    An IPv4 address that is mapped into IPv6 is returned as IPv4, so that it is one address everywhere.
    """
    match = _NODE.fullmatch(text)
    if match is None:
        return None
    try:
        if match[1]:
            return IPv4Address(match[1])
        address = IPv6Address(match[2] or match[3])
    except ValueError:
        return None
    return address.ipv4_mapped or address


def _network(entry: str) -> IPv4Network | IPv6Network:
    try:
        # A star is everybody, and so is this.
        network = ip_network("::/0" if entry == "*" else entry)
    except ValueError as error:
        raise ConfigurationError(
            f'"{entry}" in trusted is no network: {error}. Write it like "10.0.0.0/8" or "2001:db8::/32", a single '
            f'proxy like "10.0.0.1", and a unix socket as "{UNIX}"; names are not looked up.'
        ) from None
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is not None and network.prefixlen >= 96:
        network = IPv4Network((mapped, network.prefixlen - 96))
    if not network.prefixlen:
        raise ConfigurationError(
            f'"{entry}" in trusted takes everybody\'s word for who they are: a caller would send a made-up address '
            'with each request, and never meet a limit. Name the networks of your proxies, such as ("10.0.0.0/8",); '
            "where these change, say how many proxies stand in front with hops=1 instead."
        )
    return network


def _split(text: str, separator: str) -> Iterator[str]:
    """Split from the right, where a separator in a quoted string does not count.

    From the right, since a quote that a caller left open must not swallow what the proxies wrote after it.
    """
    end, quoted = len(text), False
    for at in range(end - 1, max(-1, end - 1 - MOST_CHARACTERS), -1):
        if text[at] == '"':
            # A quote within a string follows a backslash; the one that opens it follows an equals sign.
            quoted = not quoted or text[at - 1 : at] == "\\"
        elif text[at] == separator and not quoted:
            yield text[at + 1 : end]
            end = at
    # Of a chain that is cut off, the left-most hop may be half a hop.
    if len(text) < MOST_CHARACTERS:
        yield text[:end]


def _node(element: str) -> str:
    """Return the value of an element's one ``for``, without quotes; empty where there is none, or more."""
    pairs = (pair.partition("=") for pair in _split(element, ";"))
    values = [value.strip(" \t") for name, _, value in pairs if name.strip(" \t").lower() == "for"]
    if len(values) != 1:
        return ""
    value = values[0]
    if len(value) > 1 and value[0] == value[-1] == '"':
        return _ESCAPED.sub(r"\1", value[1:-1])
    return value
