import asyncio
from collections.abc import Iterable

import pytest
from starlette.routing import Route
from starlette.types import Message, Scope

from http_middleware.body import Body, ClientGoneError
from http_middleware.call import HeaderMetadata, HttpCall
from http_middleware.routes import RouteTable
from resilience import PayloadTooLargeError

END: Message = {"type": "http.request", "body": b"", "more_body": False}


class Client:
    """Hands in messages, and remembers how many were taken."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)

    async def receive(self) -> Message:
        return self.messages.pop(0)


def piece(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def body_of(client: Client, *headers: tuple[bytes, bytes]) -> Body:
    return Body(HeaderMetadata(headers), client.receive)


def read(client: Client, limit: int, *headers: tuple[bytes, bytes]) -> bytes:
    return asyncio.run(body_of(client, *headers).read(limit))


def scope_of(kind: str = "http", method: str = "POST", headers: Iterable[tuple[bytes, bytes]] = ()) -> Scope:
    scope: Scope = {
        "type": kind,
        "path": "/orders/7",
        "query_string": b"a=1&b=%C3%A9",
        "headers": list(headers),
        "client": ("192.0.2.1", 5),
    }
    return {**scope, "method": method} if kind == "http" else scope


async def show() -> None:
    raise AssertionError


ROUTES = RouteTable([Route("/orders/{id}", show, methods=["POST"]), Route("/bills/{id}", show, methods=["POST"])])


def call_of(scope: Scope) -> HttpCall:
    return HttpCall(scope, None, ROUTES)


def test_of_a_header_that_is_sent_twice_the_first_counts() -> None:
    assert HeaderMetadata([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]).get("a") == "1"


def test_a_header_that_was_not_sent_is_none() -> None:
    metadata = HeaderMetadata([(b"a", b"1")])

    assert metadata.get("b") is None
    assert metadata.get_all("b") == []


def test_an_empty_header_is_not_a_missing_one() -> None:
    assert HeaderMetadata([(b"a", b"")]).get("a") == ""


def test_all_values_of_a_header_come_in_order() -> None:
    assert HeaderMetadata([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]).get_all("a") == ["1", "3"]


def test_every_byte_of_a_header_is_kept_as_one_character() -> None:
    assert HeaderMetadata([(b"a", bytes(range(256)))]).get("a") == "".join(map(chr, range(256)))


def test_a_body_is_the_join_of_its_pieces() -> None:
    assert read(Client(piece(b"a"), piece(b""), piece(b"bc", more=False)), 10) == b"abc"


def test_a_message_without_members_is_an_empty_body() -> None:
    assert read(Client({"type": "http.request"}), 10) == b""


async def test_a_body_that_was_read_is_given_to_the_application_once_and_whole() -> None:
    later: Message = {"type": "http.disconnect"}
    body = body_of(Client(piece(b"a"), piece(b"b", more=False), later))
    await body.read(10)
    receive = body.receiver()

    assert await receive() == {"type": "http.request", "body": b"ab", "more_body": False}
    assert await receive() is later


def test_a_body_that_nobody_read_passes_message_by_message() -> None:
    sent = [piece(b"a"), piece(b"b", more=False)]

    async def scenario() -> list[Message]:
        receive = body_of(Client(*sent)).receiver()
        return [await receive(), await receive()]

    assert asyncio.run(scenario()) == sent


def test_a_body_of_exactly_the_limit_fits() -> None:
    assert read(Client(piece(b"x" * 5), piece(b"y" * 5, more=False)), 10, (b"content-length", b"10")) == b"xxxxxyyyyy"


def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    client = Client(piece(b"x" * 6), piece(b"x" * 6), piece(b"x" * 6), END)

    with pytest.raises(PayloadTooLargeError) as raised:
        read(client, 10)

    assert raised.value.limit == 10
    assert len(client.messages) == 2


def test_a_body_that_says_it_is_over_the_limit_is_not_read_at_all() -> None:
    client = Client(END)

    with pytest.raises(PayloadTooLargeError):
        read(client, 10, (b"content-length", b"11"))

    assert client.messages == [END]


@pytest.mark.parametrize("length", [b"", b"-1", b"1e9", b"0x99", b"99 ", b"\xb2\xb3", b"9" * 20, b"9" * 10_000])
def test_a_length_that_is_no_sane_number_is_ignored(length: bytes) -> None:
    assert read(Client(piece(b"abc", more=False)), 10, (b"content-length", length)) == b"abc"


@pytest.mark.parametrize("before", [[], [piece(b"a")]])
def test_a_client_that_leaves_before_its_body_is_whole_is_told_apart(before: list[Message]) -> None:
    with pytest.raises(ClientGoneError):
        read(Client(*before, {"type": "http.disconnect"}), 10)


def test_a_call_knows_its_peer_without_the_port() -> None:
    assert call_of(scope_of()).peer == "192.0.2.1"


@pytest.mark.parametrize("client", [None, ()])
def test_a_call_over_a_unix_socket_has_no_peer(client: object) -> None:
    assert call_of({**scope_of(), "client": client}).peer is None


def test_a_scope_without_a_client_has_no_peer() -> None:
    scope = dict(scope_of())
    del scope["client"]

    assert call_of(scope).peer is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE"])
def test_a_method_without_effects_is_safe(method: str) -> None:
    assert call_of(scope_of(method=method)).safe


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "PROPFIND", "get"])
def test_any_other_method_is_not_safe(method: str) -> None:
    assert not call_of(scope_of(method=method)).safe


def test_a_websocket_is_a_stream_and_not_safe() -> None:
    call = call_of(scope_of("websocket"))

    assert call.streaming
    assert not call.safe


def test_a_request_is_no_stream() -> None:
    assert not call_of(scope_of()).streaming


def test_a_call_comes_through_the_http_door() -> None:
    assert call_of(scope_of()).protocol == "http"


def test_the_resource_is_the_path_and_the_query_as_they_came() -> None:
    assert call_of(scope_of()).resource() == "/orders/7?a=1&b=%C3%A9"


def test_a_question_mark_in_a_path_is_not_mistaken_for_a_query() -> None:
    plain = {**scope_of(), "path": "/a?b", "query_string": b""}
    queried = {**scope_of(), "path": "/a", "query_string": b"b"}

    assert call_of(plain).resource() != call_of(queried).resource()


def test_a_scope_without_a_query_has_a_resource() -> None:
    scope = dict(scope_of())
    del scope["query_string"]

    assert call_of(scope).resource().startswith("/orders/7")


def test_the_operation_is_looked_up_once_and_only_when_it_is_asked_for() -> None:
    scope = scope_of()
    call = call_of(scope)
    scope["path"] = "/bills/7"
    assert call.operation == "POST /bills/{id}"

    scope["path"] = "/orders/7"
    assert call.operation == "POST /bills/{id}"


def test_a_call_whose_target_was_rewritten_on_its_way_to_the_core_is_named_anew() -> None:
    scope = scope_of()
    call = call_of(scope)
    assert call.operation == "POST /orders/{id}"

    call.locate({**scope, "path": "/bills/7"})
    assert (call.operation, call.resource()) == ("POST /bills/{id}", "/bills/7?a=1&b=%C3%A9")


def test_a_mount_that_moves_the_root_of_a_located_call_changes_nothing() -> None:
    scope = scope_of()
    call = call_of(scope)
    call.locate(scope)
    scope.update(path="/7", root_path="/orders")

    assert (call.operation, call.resource()) == ("POST /orders/{id}", "/orders/7?a=1&b=%C3%A9")


async def test_a_call_without_a_reader_has_an_empty_payload() -> None:
    assert await call_of(scope_of()).payload(10) == b""
