from typing import Any

import pytest
from starlette.types import Scope

from http_middleware.call import HttpCall
from http_middleware.client_address import ClientAddress
from http_middleware.routes import RouteTable
from resilience.caller import by_address
from resilience.errors import ConfigurationError

PROXY, CLIENT = "10.0.0.1", "203.0.113.9"
BEHIND_A_PROXY = ClientAddress(trusted=("10.0.0.0/8",))


def scope_of(*lines: str, peer: str | None = PROXY, header: str = "x-forwarded-for", kind: str = "http") -> Scope:
    scope: Scope = {
        "type": kind,
        "path": "/",
        "headers": [(b"host", b"shop"), *((header.encode(), line.encode("latin-1")) for line in lines)],
        "client": peer and (peer, 5000),
    }
    return {**scope, "method": "GET"} if kind == "http" else scope


ROUTES = RouteTable(())


def test_a_caller_is_who_the_proxy_says() -> None:
    assert BEHIND_A_PROXY.peer(scope_of(f"1.1.1.1, {CLIENT}:4711, 10.0.0.2")) == CLIENT


def test_who_connects_without_the_proxy_is_believed_nothing() -> None:
    assert BEHIND_A_PROXY.peer(scope_of("1.1.1.1", peer=CLIENT)) == CLIENT


def test_a_request_without_the_header_has_the_address_of_its_connection() -> None:
    assert BEHIND_A_PROXY.peer(scope_of()) == PROXY
    assert ClientAddress(hops=1).peer(scope_of()) == PROXY


def test_lines_count_as_one_in_the_order_they_came() -> None:
    assert BEHIND_A_PROXY.peer(scope_of("1.1.1.1", CLIENT, "10.0.0.3, 10.0.0.2")) == CLIENT
    assert ClientAddress(hops=2).peer(scope_of("1.1.1.1", CLIENT, "10.0.0.2")) == CLIENT


def test_a_quote_left_open_on_one_line_does_not_reach_the_next() -> None:
    address = ClientAddress(trusted=(PROXY,), header="forwarded")

    assert address.peer(scope_of('for="1.1.1.1', f'for="{CLIENT}"', header="forwarded")) == CLIENT


@pytest.mark.parametrize("line", ["\xff\xfe", "\x00", "é", '"', "1.1.1.1, \xa0"])
def test_bytes_that_mean_nothing_are_no_address(line: str) -> None:
    assert BEHIND_A_PROXY.peer(scope_of(line)) == PROXY


def test_only_the_named_header_is_read() -> None:
    forwarded = ClientAddress(trusted=(PROXY,), header="forwarded")

    assert forwarded.peer(scope_of(f'for="[2001:db8::1]:4711";by={PROXY}', header="forwarded")) == "2001:db8::1"
    assert forwarded.peer(scope_of(CLIENT)) == PROXY
    assert BEHIND_A_PROXY.peer(scope_of(f"for={CLIENT}", header="forwarded")) == PROXY


def test_a_proxy_at_a_unix_socket_is_believed_only_where_it_is_named() -> None:
    assert BEHIND_A_PROXY.peer(scope_of(CLIENT, peer=None)) is None
    assert ClientAddress(trusted=("unix",)).peer(scope_of(CLIENT, peer=None)) == CLIENT


def test_a_scope_without_a_client_counts_as_a_unix_socket() -> None:
    scope = dict(scope_of(CLIENT))
    del scope["client"]

    assert BEHIND_A_PROXY.peer(scope) is None
    assert ClientAddress(trusted=("unix",)).peer(scope) == CLIENT


def test_a_count_of_proxies_takes_that_place_from_the_right() -> None:
    assert ClientAddress(hops=2).peer(scope_of(f"1.1.1.1, {CLIENT}, 172.16.0.9", peer="172.16.0.8")) == CLIENT


def test_a_chain_shorter_than_the_count_leaves_the_address_of_the_connection() -> None:
    assert ClientAddress(hops=2).peer(scope_of("1.1.1.1", peer=CLIENT)) == CLIENT


def test_answers_are_the_same_when_asked_again_and_never_those_of_another_connection() -> None:
    address = ClientAddress(trusted=("10.0.0.0/8",))

    for _ in range(2):
        assert address.peer(scope_of("1.1.1.1")) == "1.1.1.1"
        assert address.peer(scope_of("1.1.1.1", peer=CLIENT)) == CLIENT
        assert address.peer(scope_of("2.2.2.2")) == "2.2.2.2"


def test_what_callers_send_can_fill_only_so_much_memory() -> None:
    address = ClientAddress(trusted=("10.0.0.0/8",))
    for number in range(3000):
        assert address.peer(scope_of(f"{number}, {CLIENT}")) == CLIENT
        if not number % 100:
            assert address.peer(scope_of(f"{number}" + "," * 61440 + CLIENT)) == CLIENT

    assert address._remembered.cache_info().currsize == 1024


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_call_is_counted_for_who_the_proxy_says(kind: str) -> None:
    call = HttpCall(scope_of(f"1.1.1.1, {CLIENT}", kind=kind), None, ROUTES, BEHIND_A_PROXY.peer)

    assert call.peer == CLIENT
    assert by_address(call) == f"addr:{CLIENT}"


def test_a_call_is_counted_for_its_connection_where_no_proxy_is_named() -> None:
    assert HttpCall(scope_of(CLIENT), None, ROUTES).peer == PROXY
    assert HttpCall(scope_of(CLIENT), None, ROUTES, None).peer == PROXY


@pytest.mark.parametrize("options", [{}, {"trusted": (PROXY,), "hops": 1}])
def test_one_of_networks_and_a_count_must_be_said(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="needs either trusted"):
        ClientAddress(**options)


@pytest.mark.parametrize("hops", [0, -1, 65])
def test_a_count_out_of_range_is_refused(hops: int) -> None:
    with pytest.raises(ConfigurationError, match=f"hops must be 1 to 64, not {hops}"):
        ClientAddress(hops=hops)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "x-real-ip", ""])
def test_a_header_of_another_name_is_refused(header: Any) -> None:
    with pytest.raises(ConfigurationError, match=f'header must be .*, not "{header}"'):
        ClientAddress(hops=1, header=header)


@pytest.mark.parametrize("everybody", ["*", "0.0.0.0/0", "::/0"])
def test_trust_in_everybody_is_refused(everybody: str) -> None:
    with pytest.raises(ConfigurationError, match=r"takes everybody's word .* hops=1 instead"):
        ClientAddress(trusted=[everybody])
