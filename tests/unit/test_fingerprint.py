from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from uuid import UUID

import pytest
from pydantic import BaseModel

from examples.payments.v1 import payments_pb2
from resilience.decisions.fingerprint import canonical, fingerprint, fingerprint_of_values


def test_a_fingerprint_names_its_door_and_has_one_length() -> None:
    assert fingerprint("http", "", b"").startswith(b"http:")
    assert fingerprint("grpc", "x", b"y" * 1000).startswith(b"grpc:")
    assert len(fingerprint("http", "", b"")) == len(fingerprint("http", "x" * 100, b"y" * 1000)) == 5 + 32


@pytest.mark.parametrize(
    ("payload", "same"),
    [
        (b'{"a":1,"b":[1,2]}', b'{ "b" : [1, 2],\n "a" : 1 }\n'),
        (b'{"a":{"x":1,"y":2}}', b'{"a":{"y":2,"x":1}}'),
        (b'[{"a":1,"b":2}]', b'[{"b":2,"a":1}]'),
        (b'{"a":1.10}', b'{"a": 1.10}'),
        ('{"a":"é"}'.encode(), b'{"a":"\\u00e9"}'),
        (b"{}", b"{ }"),
        (b"not json", b"not json"),
    ],
)
def test_json_counts_by_its_value(payload: bytes, same: bytes) -> None:
    assert fingerprint("http", "", payload) == fingerprint("http", "", same)


@pytest.mark.parametrize(
    ("payload", "other"),
    [
        (b'{"a":1}', b'{"a":2}'),
        (b'{"a":1}', b'{"b":1}'),
        (b'{"a":1}', b'{"a":"1"}'),
        (b'{"a":1}', b'{"a":true}'),
        (b'{"a":null}', b"{}"),
        (b"[1,2]", b"[2,1]"),
        (b'{"a":1.1}', b'{"a":1.10}'),
        (b'{"a":1.0}', b'{"a":1}'),
        (b'{"a":0.1}', b'{"a":0.1000000000000000055511151231257827}'),
        (b'{"a":12345678901234567890123}', b'{"a":12345678901234567890124}'),
        (b'{"a":1.5}', b'{"a":"1.5"}'),
        (b'{"a":1,"a":2}', b'{"a":2}'),
        (b'{"a":1,"a":2}', b'{"a":2,"a":1}'),
        (b'{"x":{"a":1,"a":2}}', b'{"x":{"a":2}}'),
        (b"not json", b"not  json"),
        (b"{not json", b"{not  json"),
        (b"", b" "),
    ],
)
def test_another_request_has_another_fingerprint(payload: bytes, other: bytes) -> None:
    assert fingerprint("http", "", payload) != fingerprint("http", "", other)


def test_the_resource_counts_apart_from_the_payload() -> None:
    assert fingerprint("http", "ab", b"c") != fingerprint("http", "a", b"bc")
    assert fingerprint("http", "id=1", b"c") != fingerprint("http", "id=2", b"c")


def test_a_resource_that_is_no_text_counts_too() -> None:
    assert fingerprint("http", "\ud800", b"") != fingerprint("http", "\ud801", b"")


def test_the_doors_differ() -> None:
    assert fingerprint("http", "", b"x") != fingerprint("grpc", "", b"x")


@pytest.mark.parametrize(
    "payload", [b"", b"plain", b"{", b"[1,", b'{"a":1,"a":1}', b"{\xff}", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"]
)
def test_what_is_no_usable_json_counts_by_its_bytes(payload: bytes) -> None:
    assert canonical(payload) == payload


def test_canonical_json_is_sorted_and_tight() -> None:
    assert canonical(b'{ "b": [1, true, null], "a": "x" }') == b'{"a":"x","b":[1,true,null]}'


@dataclass
class Card:
    number: str
    limits: dict[str, Decimal]


class Color(Enum):
    RED = "red"


class Order(BaseModel):
    item: str
    count: int


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([1, 2], (1, 2)),
        (Card("1", {"x": Decimal("1.0")}), {"limits": {"x": Decimal("1.0")}, "number": "1"}),
        (Color.RED, "red"),
        (Order(item="x", count=1), {"item": "x", "count": 1}),
        (payments_pb2.Payment(id="p", amount=1), payments_pb2.Payment(amount=1, id="p")),
        ({1: "a", "b": None}, {"b": None, 1: "a"}),
    ],
)
def test_values_count_by_what_they_say(values: object, same: object) -> None:
    assert fingerprint_of_values(values) == fingerprint_of_values(same)


def test_values_that_differ_in_type_order_or_cut_differ() -> None:
    values: list[object] = [
        None, "", b"", 0, False, 0.0, Decimal(0), "0", "None", [], {}, [[]], [None], ["a", "bc"], ["ab", "c"],
        [["a"], "b"], ["a", ["b"]], [1, 2], [2, 1], {"a": 1}, {1: "a"}, {"a": [1]}, date(2026, 1, 1), "2026-01-01",
        datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, 1, tzinfo=UTC), timedelta(1), UUID(int=0),
        str(UUID(int=0)), "\ud800",
    ]  # fmt: skip
    assert len({fingerprint_of_values(value) for value in values}) == len(values)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: None, [object()], {"a": iter(())}])
def test_a_value_that_may_look_different_elsewhere_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="need not look the same"):
        fingerprint_of_values(value)
