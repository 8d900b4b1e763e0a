"""From an RPC to a call: peers, metadata, payloads; and the parts of rendering that need no RPC."""

from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct, Value

from grpc_interceptors.call import GrpcCall, InvocationMetadata, address_of
from grpc_interceptors.render import CODES, kept_trailers, replayed_trailers
from resilience import Call, PayloadTooLargeError, Reason, Reply, wire
from resilience.caller import by_address

METHOD = "/test.Things/Go"


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:5000", "10.0.0.1"),
        ("ipv6:[::1]:5000", "::1"),
        ("ipv6:%5B::1%5D:5000", "::1"),
        ("ipv6:%5b2001%3adb8%3a%3a1%5d%3A5000", "2001:db8::1"),
        ("ipv6:[2001:db8::1]:5000", "2001:db8::1"),
        ("ipv6:[::ffff:10.0.0.1]:5000", "::ffff:10.0.0.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::1%eth0"),
        ("unix:/run/door.sock", None),
        ("unix:", None),
        ("unix-abstract:door", None),
        ("vsock:2:5000", None),
        ("", None),
        ("unknown", None),
    ],
)
def test_the_address_in_a_peer(peer: str, address: str | None) -> None:
    assert address_of(peer) == address


@pytest.mark.parametrize("peer", ["ipv6:[2001:db8::1]:5000", "ipv6:%5B2001:db8::2%5D:6000"])
def test_both_forms_of_an_ipv6_peer_are_one_caller(peer: str) -> None:
    assert by_address(build(peer=peer)) == "addr:2001:db8::/64"


def test_a_peer_without_an_address_is_a_caller_too() -> None:
    assert by_address(build(peer="unix:/run/door.sock")) == "addr:"


def test_of_a_name_that_was_sent_twice_the_first_value_counts() -> None:
    assert InvocationMetadata((("x-a", "1"), ("x-b", "2"), ("x-a", "3"))).get("x-a") == "1"


def test_every_value_of_a_name_is_there_in_the_order_it_was_sent() -> None:
    metadata = InvocationMetadata((("x-a", "1"), ("x-b", "2"), ("x-a", "3"), ("x-a", "1")))
    assert metadata.get_all("x-a") == ["1", "3", "1"]


def test_a_name_that_was_not_sent_has_no_value() -> None:
    metadata = InvocationMetadata(())
    assert (metadata.get("x-a"), metadata.get_all("x-a")) == (None, [])


def test_an_empty_value_is_a_value() -> None:
    metadata = InvocationMetadata((("x-a", ""),))
    assert (metadata.get("x-a"), metadata.get_all("x-a")) == ("", [""])


def test_a_binary_value_reads_as_text_byte_for_byte() -> None:
    data = bytes(range(256))
    metadata = InvocationMetadata((("x-bin", data),))
    assert (metadata.get("x-bin") or "").encode("latin-1") == data
    assert [value.encode("latin-1") for value in metadata.get_all("x-bin")] == [data]


def build(request: Any = b"", *, peer: str = "ipv4:10.0.0.1:5000", streaming: bool = False, safe: bool = False) -> Call:
    return GrpcCall(METHOD, (("x-a", "1"),), peer, request, streaming=streaming, safe=safe)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_a_call_is_told_as_the_rpc_is(streaming: bool, safe: bool) -> None:
    call = build(streaming=streaming, safe=safe)
    assert (call.protocol, call.operation, call.peer) == ("grpc", METHOD, "10.0.0.1")
    assert (call.streaming, call.safe, call.resource(), call.metadata.get("x-a")) == (streaming, safe, "", "1")


async def test_the_payload_of_raw_bytes_is_the_bytes() -> None:
    assert await build(b"\x00raw").payload(5) == b"\x00raw"


async def test_equal_messages_have_one_payload_whatever_order_a_map_was_filled_in() -> None:
    names = [f"name-{n}" for n in range(100)]
    one, other = Struct(), Struct()
    one.update({name: name for name in names})
    other.update({name: name for name in reversed(names)})
    assert one == other
    payload = await build(one).payload(100_000)
    assert payload == await build(other).payload(100_000)
    assert Struct.FromString(payload) == one


@pytest.mark.parametrize("request_", [b"12345", Struct(fields={"a": Value(string_value="")})], ids=["bytes", "message"])
async def test_a_payload_may_be_as_large_as_its_bound_and_no_larger(request_: Any) -> None:
    size = len(request_) if isinstance(request_, bytes) else request_.ByteSize()
    assert len(await build(request_).payload(size)) == size
    with pytest.raises(PayloadTooLargeError) as caught:
        await build(request_).payload(size - 1)
    assert caught.value.limit == size - 1


@pytest.mark.parametrize("reason", Reason)
def test_every_refusal_has_the_status_that_its_row_names(reason: Reason) -> None:
    row = wire.TABLE[reason]
    assert CODES[row.grpc] is getattr(grpc.StatusCode, row.grpc_name)


def test_every_final_code_can_be_sent_again() -> None:
    assert {CODES[code].value[0] for code in wire.GRPC_FINAL} == wire.GRPC_FINAL


def test_trailers_of_ours_are_not_kept() -> None:
    assert kept_trailers((name, "1") for name in sorted(wire.OURS)) == ()


def test_trailers_of_the_handler_come_back_as_they_were() -> None:
    trailers: tuple[tuple[str, str | bytes], ...] = (
        ("x-app", "1"),
        ("x-app-bin", bytes(range(256))),
        ("x-app", "2"),
        ("x-empty", ""),
        ("x-empty-bin", b""),
    )
    kept = kept_trailers(trailers)
    assert all(isinstance(value, str) for _, value in kept)
    assert replayed_trailers(Reply("grpc", 0, kept, b"")) == trailers
