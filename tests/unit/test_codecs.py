from dataclasses import dataclass

import pytest
from pydantic import BaseModel, ValidationError

from examples.payments.v1 import payments_pb2
from resilience.codecs import JsonCodec, MessageCodec


@dataclass(frozen=True)
class Money:
    amount: int
    currency: str


class Payment(BaseModel):
    id: str
    money: Money


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Money, Money(7, "EUR")),
        (Payment, Payment(id="pay_1", money=Money(7, "EUR"))),
        (dict[str, int], {"a": 2**60}),
        (list[Money], [Money(1, "EUR"), Money(2, "ü")]),
        (type(None), None),
    ],
)
def test_json_is_read_back_as_what_was_written(kind: type[object], value: object) -> None:
    codec = JsonCodec(kind)
    assert codec.decode(codec.encode(value)) == value


def test_json_of_another_type_is_refused() -> None:
    with pytest.raises(ValidationError):
        JsonCodec(Money).decode(JsonCodec(dict[str, str]).encode({"amount": "many"}))


def test_a_message_is_read_back_as_what_was_written() -> None:
    codec = MessageCodec(payments_pb2.Payment)
    payment = payments_pb2.Payment(id="pay_1", amount=7)
    assert codec.decode(codec.encode(payment)) == payment
