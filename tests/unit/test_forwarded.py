from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resilience.decisions.forwarded import (
    MOST_CHARACTERS,
    MOST_HOPS,
    Address,
    ChainHeader,
    TrustedProxies,
    find_by_count,
    parse_address,
    read_hops,
)
from resilience.errors import ConfigurationError

OURS = TrustedProxies(("10.0.0.0/8", "192.168.1.1", "2001:db8:ffff::/48", "fe80::/10"))
PROXY, CLIENT, CLIENT_6 = "10.0.0.1", "203.0.113.9", "2001:db8::1"


def found(text: str, peer: str | None = PROXY, header: ChainHeader = "x-forwarded-for") -> str | None:
    return OURS.find(peer, read_hops(header, text))


def told(header: ChainHeader, text: str) -> list[str | None]:
    return [None if hop is None else str(hop) for hop in read_hops(header, text)]


# -- one address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.9", CLIENT),
        ("203.0.113.9:47011", CLIENT),
        ("203.0.113.9:_port", CLIENT),
        ("[2001:db8::1]", CLIENT_6),
        ("[2001:db8::1]:4711", CLIENT_6),
        ("[2001:DB8:0:0::1]:_p.o-r_t", CLIENT_6),
        ("2001:db8::1", CLIENT_6),
        ("2001:0db8:0000:0000:0000:0000:0000:0001", CLIENT_6),
        ("::", "::"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%eth0]", "fe80::1"),
        ("[fe80::1%25en-0.1]:80", "fe80::1"),
        ("::ffff:203.0.113.9", CLIENT),
        ("[::ffff:cb00:7109]:4711", CLIENT),
        ("[0:0:0:0:0:FFFF:203.0.113.9%7]:4711", CLIENT),
    ],
)
def test_an_address_is_read_without_its_port_and_zone(text: str, address: str) -> None:
    assert str(parse_address(text)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-",
        "unknown",
        "_hidden",
        "unix:",
        "localhost",
        "testclient",
        "203.0.113",
        "203.0.113.256",
        "203.0.113.009",
        "3405803785",
        "0xcb007109",
        "203.0.113.9/32",
        "203.0.113.9%eth0",
        "203.0.113.9:",
        "203.0.113.9:123456",
        "203.0.113.9:http",
        "203.0.113.9:80:80",
        " 203.0.113.9",
        "203.0.113.9\n",
        "203.0.113.9\x00",
        "203.0.113.9 10.0.0.1",
        "٢03.0.113.9",
        '"203.0.113.9"',
        "[203.0.113.9]",
        "[2001:db8::1",
        "2001:db8::1]",
        "[2001:db8::1]4711",
        "[[2001:db8::1]]",
        "[]",
        "[]:80",
        "2001:db8",
        "2001:db8::1::2",
        "2001:db8:0:0:0:0:0:1:4711",
        "fe80::1%",
        "fe80::1%eth 0",
        "fe80::1%" + "e" * 65,
        "http://203.0.113.9",
        ":" * 46,
        "1" * 9000,
    ],
)
def test_what_is_not_quite_an_address_is_none(text: str) -> None:
    assert parse_address(text) is None


@given(st.ip_addresses(), st.sampled_from(["", ":0", ":65535", ":_x"]))
def test_every_address_is_read_as_itself(address: Address, port: str) -> None:
    text = str(address) if address.version == 4 else f"[{address}]"

    assert parse_address(text + port) == (getattr(address, "ipv4_mapped", None) or address)


@given(st.text())
def test_no_text_is_more_than_an_address_or_none(text: str) -> None:
    address = parse_address(text)

    assert address is None or address == ip_address(str(address))


# -- a chain


@pytest.mark.parametrize(
    ("text", "hops"),
    [
        ("", [None]),
        ("203.0.113.9", [CLIENT]),
        ("1.1.1.1, 2.2.2.2,3.3.3.3\t,\t4.4.4.4:80", ["4.4.4.4", "3.3.3.3", "2.2.2.2", "1.1.1.1"]),
        ("1.1.1.1,,2.2.2.2,", [None, "2.2.2.2", None, "1.1.1.1"]),
        ("unknown, 2.2.2.2, _x", [None, "2.2.2.2", None]),
        ('"1.1.1.1", 2.2.2.2', ["2.2.2.2", None]),
        ("for=1.1.1.1", [None]),
        ("203.0.113.9\xa0", [None]),
    ],
)
def test_x_forwarded_for_is_read_from_the_right(text: str, hops: list[str | None]) -> None:
    assert told("x-forwarded-for", text) == hops


@pytest.mark.parametrize(
    ("text", "hops"),
    [
        ("for=203.0.113.9", [CLIENT]),
        ('For="[2001:db8::1]:4711"', [CLIENT_6]),
        ("for=[2001:db8::1]:4711", [CLIENT_6]),
        ('for="203.0.113.9:_x"', [CLIENT]),
        ("for=203.0.113.9;proto=http;by=203.0.113.43", [CLIENT]),
        ("proto=http ; FOR = 203.0.113.9 ; by=1.1.1.1;", [CLIENT]),
        ('host="a,b;for=1.1.1.1";for=203.0.113.9', [CLIENT]),
        ('for=203.0.113.9;x="a\\",for=1.1.1.1;for=2.2.2.2"', [CLIENT]),
        ('for=203.0.113.9;x="a\\\\", for=1.1.1.1', ["1.1.1.1", CLIENT]),
        (r'for="203.0\.113.9"', [CLIENT]),
        ("for=1.1.1.1, for=2.2.2.2,for=3.3.3.3", ["3.3.3.3", "2.2.2.2", "1.1.1.1"]),
        ("for=unknown, for=_x, for=", [None, None, None]),
        ("", [None]),
        ("proto=https;by=1.1.1.1", [None]),
        ("for=1.1.1.1;for=2.2.2.2", [None]),
        ("for=1.1.1.1;for=1.1.1.1", [None]),
        ("203.0.113.9", [None]),
        ("xfor=1.1.1.1", [None]),
        ('for="203.0.113.9', [None]),
        ('for=203.0.113.9"', [None]),
        ('for="', [None]),
        ('for=""', [None]),
        ('for="203.0.113.9\\"', [None]),
        ('for="1.1.1.1""2.2.2.2"', [None]),
        ('for=" 203.0.113.9"', [None]),
        ('for=203.0.113.9;x="', [None]),
    ],
)
def test_forwarded_is_read_from_the_right(text: str, hops: list[str | None]) -> None:
    assert told("forwarded", text) == hops


@pytest.mark.parametrize("left", ['for="', 'for="1.1.1.1', 'for="\\', 'x=";', '"', '""", "', "\\"])
def test_a_quote_that_a_caller_leaves_open_swallows_nothing_that_a_proxy_wrote(left: str) -> None:
    assert told("forwarded", f'{left},for=203.0.113.9;x="a,b", for=10.0.0.2')[:2] == ["10.0.0.2", CLIENT]


def test_no_more_hops_are_looked_at_than_the_bound() -> None:
    assert len(told("x-forwarded-for", ",".join(["10.0.0.2"] * 5000))) == MOST_HOPS


def test_no_more_text_is_looked_at_than_the_bound() -> None:
    assert told("x-forwarded-for", "10.0.0.2," + "1" * MOST_CHARACTERS) == []
    assert told("x-forwarded-for", "10.0.0.2," + "1" * (MOST_CHARACTERS - 1)) == [None]
    assert told("x-forwarded-for", "10.0.0.2" + ", 10.0.0.3".rjust(MOST_CHARACTERS)) == ["10.0.0.3"]


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
@pytest.mark.parametrize("flood", ['"', '"\\', "\\", ";", "for=", " ", "=", ",", "a", '";"', "[", "%", "\xff", '\\",'])
def test_a_flood_of_60_kib_is_answered_from_its_right_end(header: ChainHeader, flood: str) -> None:
    flood *= 61440 // len(flood)
    last = "203.0.113.9" if header == "x-forwarded-for" else "for=203.0.113.9"

    assert found(flood, header=header) == PROXY
    assert found(f"{flood},{last}", header=header) == CLIENT


# -- by trusted networks


@pytest.mark.parametrize(
    ("peer", "text", "address"),
    [
        # Who is no proxy is believed nothing.
        (CLIENT, "1.1.1.1", CLIENT),
        (CLIENT, "1.1.1.1, 10.0.0.2", CLIENT),
        ("11.0.0.1", "", "11.0.0.1"),
        ("testclient", "1.1.1.1", "testclient"),
        ("", "1.1.1.1", ""),
        # One proxy, and several.
        (PROXY, CLIENT, CLIENT),
        (PROXY, f"{CLIENT}, 10.0.0.2, 192.168.1.1", CLIENT),
        (PROXY, f"{CLIENT}:5, 2001:db8:ffff::2, [2001:db8:ffff:1::3]:80, fe80::2%eth1", CLIENT),
        ("fe80::1%eth0", CLIENT, CLIENT),
        (PROXY, "[2001:db8:1::7]:4711", "2001:db8:1::7"),
        # Proxies and callers that a dual-stack socket tells in IPv6.
        ("::ffff:10.0.0.1", f"::ffff:{CLIENT}, ::ffff:10.0.0.2", CLIENT),
        ("::ffff:0a00:0001", f"[::ffff:{CLIENT}]:80", CLIENT),
        ("::ffff:11.0.0.1", CLIENT, "::ffff:11.0.0.1"),
        # What is left of the caller is the caller's own text.
        (PROXY, f"10.0.0.3, {CLIENT}", CLIENT),
        (PROXY, f"1.1.1.1, 10.0.0.3, {CLIENT}, 10.0.0.2", CLIENT),
        (PROXY, f"unknown,,_x,\x00, {CLIENT}", CLIENT),
        (PROXY, f"192.168.1.2, {CLIENT}, 192.168.1.1", CLIENT),
        # A hop that can't be read ends the walk at the proxy that reported it.
        (PROXY, f"{CLIENT}, unknown", PROXY),
        (PROXY, f"{CLIENT}, unknown, 10.0.0.2", "10.0.0.2"),
        (PROXY, f"{CLIENT}, _x, 10.0.0.3, 10.0.0.2", "10.0.0.3"),
        (PROXY, f"{CLIENT}, , [2001:db8:ffff::0002]:80", "2001:db8:ffff::2"),
        (PROXY, f"{CLIENT},", PROXY),
        (PROXY, "", PROXY),
        # Nobody but proxies: the left-most may be a caller's invention.
        (PROXY, "10.0.0.2", PROXY),
        (PROXY, "10.9.9.9, 10.0.0.3, 10.0.0.2", PROXY),
        (PROXY, ", ".join(["10.0.0.2"] * 100), PROXY),
        (PROXY, f"{CLIENT}, " + ", ".join(["10.0.0.2"] * MOST_HOPS), PROXY),
        (PROXY, f"{CLIENT}, " + ", ".join(["10.0.0.2"] * (MOST_HOPS - 1)), CLIENT),
    ],
)
def test_the_caller_is_the_first_from_the_right_that_is_no_proxy(peer: str, text: str, address: str) -> None:
    assert found(text, peer) == address


def test_a_unix_socket_is_believed_only_where_it_is_named() -> None:
    with_unix = TrustedProxies(("10.0.0.0/8", "unix"))

    assert found(CLIENT, None) is None
    assert with_unix.find(None, read_hops("x-forwarded-for", f"1.1.1.1, {CLIENT}, 10.0.0.2")) == CLIENT
    assert with_unix.find(None, read_hops("x-forwarded-for", "10.0.0.2")) is None
    assert TrustedProxies(("unix",)).find(None, read_hops("x-forwarded-for", CLIENT)) == CLIENT
    assert TrustedProxies(("unix",)).find(PROXY, read_hops("x-forwarded-for", CLIENT)) == PROXY


def test_an_ipv4_network_that_is_mapped_into_ipv6_is_the_ipv4_network() -> None:
    mapped = TrustedProxies(("::ffff:10.0.0.0/104",))

    assert mapped.trust_peer("10.1.2.3")
    assert mapped.trust_peer("::ffff:10.1.2.3")
    assert not mapped.trust_peer("11.0.0.1")


@pytest.mark.parametrize("entry", ["*", "0.0.0.0/0", "::/0", "::ffff:0:0/96", "0.0.0.0/0.0.0.0"])
def test_trust_in_everybody_is_refused_with_what_to_write_instead(entry: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        TrustedProxies(("10.0.0.0/8", entry))

    for part in (f'"{entry}" in trusted', "made-up address", '("10.0.0.0/8",)', "hops=1"):
        assert part in str(refused.value)


@pytest.mark.parametrize("entry", ["", "nginx", "10.0.0.1/8", "10.0.0.0/33", "10.*", " 10.0.0.1", "[::1]", "Unix"])
def test_what_is_no_network_is_refused_with_how_to_write_one(entry: str) -> None:
    with pytest.raises(ConfigurationError, match=r"in trusted is no network: .* Write it like") as refused:
        TrustedProxies((entry,))

    assert f'"{entry}"' in str(refused.value)


@pytest.mark.parametrize("entries", [(), [], "10.0.0.0/8", "*"])
def test_what_is_no_list_of_networks_is_refused(entries: str | list[str] | tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="must be a tuple of the networks"):
        TrustedProxies(entries)


# -- by count


@pytest.mark.parametrize(
    ("count", "text", "address"),
    [
        (1, CLIENT, CLIENT),
        (1, f"1.1.1.1, {CLIENT}", CLIENT),
        (2, f"1.1.1.1, {CLIENT}, 10.0.0.2", CLIENT),
        # What a proxy in between told of its own caller need not be an address.
        (2, f"1.1.1.1, {CLIENT}, unix:", CLIENT),
        (3, f"{CLIENT}, , 10.0.0.2", CLIENT),
        # A chain that is too short came past the proxies.
        (1, "", PROXY),
        (2, "1.1.1.1", PROXY),
        (3, "1.1.1.1, 2.2.2.2", PROXY),
        (MOST_HOPS, "1.1.1.1", PROXY),
        # The place counts, not the next best address.
        (1, "1.1.1.1, unknown", PROXY),
        (2, "1.1.1.1, _x, 10.0.0.2", PROXY),
    ],
)
def test_with_a_count_the_caller_stands_that_many_places_from_the_right(count: int, text: str, address: str) -> None:
    assert find_by_count(PROXY, read_hops("x-forwarded-for", text), count) == address


def test_with_a_count_a_unix_socket_is_no_different() -> None:
    assert find_by_count(None, read_hops("x-forwarded-for", CLIENT), 1) == CLIENT
    assert find_by_count(None, read_hops("x-forwarded-for", ""), 1) is None


# -- whatever a caller writes

quoted = st.text(st.sampled_from('a,;="\\ ') | st.characters(min_codepoint=32, max_codepoint=255), max_size=12).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)
ports = st.sampled_from(["", ":80", ":_x"])
callers = (st.ip_addresses(v=4) | st.ip_addresses(v=6)).filter(lambda address: not OURS.trust(parsed(str(address))))
proxies = st.sampled_from(["10.0.0.1", "10.255.0.1", "192.168.1.1", "2001:db8:ffff::7", "fe80::9", "::ffff:10.1.1.1"])
forged = st.text(
    st.sampled_from(' ,;="\\[]:%_.') | st.characters(min_codepoint=0, max_codepoint=255), max_size=40
) | st.lists(
    st.sampled_from(
        ["10.0.0.1", "1.1.1.1", "unknown", "for=10.0.0.9", 'for="1.1.1.1', '"', "\\", "::1", "192.168.1.1", 'for="\\"']
    ),
    max_size=70,
).map(",".join)


def parsed(text: str) -> Address:
    address = parse_address(text)
    assert address is not None
    return address


@st.composite
def elements(draw: st.DrawFn, address: str, header: ChainHeader) -> str:
    """What a proxy writes about ``address``, in any way that its kind of header allows."""
    node = (f"[{address}]" if ":" in address else address) + draw(ports)
    if header == "x-forwarded-for":
        return draw(st.sampled_from([node, address]))
    name, more = draw(st.sampled_from(["for", "For", "FOR"])), st.lists(quoted, max_size=2)
    before = "".join(f"host={value};" for value in draw(more))
    after = "".join(f";x={value}" for value in draw(more))
    return f'{before}{name}="{node}"{after}'


@st.composite
def genuine(draw: st.DrawFn) -> tuple[ChainHeader, str, int, str]:
    """Return a header, the part of it that proxies wrote, how many they were, and the caller's address."""
    header: ChainHeader = draw(st.sampled_from(["x-forwarded-for", "forwarded"]))
    caller = str(draw(callers))
    hops = [caller, *draw(st.lists(proxies, max_size=6))]
    text = draw(st.sampled_from([",", ", ", " ,\t"])).join(draw(elements(hop, header)) for hop in hops)
    return header, text, len(hops), str(parsed(caller))


@example(("forwarded", "for=203.0.113.9", 1, CLIENT), 'for="')
@example(("forwarded", 'for=203.0.113.9;x="\\\\"', 1, CLIENT), 'for="\\')
@given(genuine(), forged)
def test_nothing_that_a_caller_writes_changes_who_it_is(part: tuple[ChainHeader, str, int, str], left: str) -> None:
    header, text, count, caller = part

    for chain in (text, f"{left},{text}", f"{left * 2000},{text}"):
        assert found(chain, header=header) == caller
        assert find_by_count(PROXY, read_hops(header, chain), count) == caller


@given(st.sampled_from(["x-forwarded-for", "forwarded"]), forged, callers)
def test_nothing_that_a_stranger_writes_is_read(header: ChainHeader, text: str, peer: Address) -> None:
    assert found(text, str(peer), header) == str(peer)


@given(st.sampled_from(["x-forwarded-for", "forwarded"]), st.text() | forged)
def test_any_text_is_answered_with_an_address(header: ChainHeader, text: str) -> None:
    address = found(text, header=header)

    assert address is not None
    assert str(parse_address(address)) == address
