"""Keys that follow from an operation's parameters."""

import os
import subprocess
import sys
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.decisions.idempotency import accept_key, generate_idempotency_key

USER = UUID("8e03978e-40d5-43dd-bc93-6894a57f9324")
PARTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.dates(),
    st.datetimes(),
)


def test_a_key_is_what_it_was_in_every_earlier_release() -> None:
    key = generate_idempotency_key("create_payment", USER, Decimal("10.50"), "EUR")

    assert key == "dc0314cd8f21c3015778a1fce4d7d0871100ebacd4753bf362b8707c5f9fa41d"


def test_a_key_is_the_same_in_another_process() -> None:
    code = "from resilience.decisions.idempotency import *; print(generate_idempotency_key('pay', 1.5, b'x', None))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}

    other = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)

    assert other.stdout.strip() == generate_idempotency_key("pay", 1.5, b"x", None)


@given(st.lists(PARTS, min_size=1))
def test_a_key_is_one_that_can_be_sent(parts: list[Any]) -> None:
    key = generate_idempotency_key(*parts)

    assert accept_key([key]) == key
    assert generate_idempotency_key(*parts) == key


@given(st.lists(st.one_of(st.text(), st.binary(), st.integers()), min_size=1), st.data())
def test_other_parts_give_another_key(parts: list[Any], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.one_of(st.text(), st.binary(), st.integers()), min_size=1))

    same = [(type(part), part) for part in parts] == [(type(part), part) for part in other]
    assert (generate_idempotency_key(*parts) == generate_idempotency_key(*other)) is same


LOOKALIKES: list[tuple[Any, ...]] = [
    ("a", "bc"),
    ("ab", "c"),
    ("abc",),
    ("bc", "a"),
    ("abc", ""),
    ("", "abc"),
    ("abc", None),
    ("abc", "None"),
    (b"abc",),
    ("b'abc'",),
    (1,),
    (1.0,),
    (True,),
    ("1",),
    ("True",),
    (b"1",),
    (Decimal(1),),
    (Decimal("1.00"),),
    (None,),
    ("None",),
    (USER,),
    (str(USER),),
    (date(2024, 1, 2),),
    (datetime(2024, 1, 2, tzinfo=UTC),),
    ("2024-01-02",),
    ("a2:str:1:b",),
    ("a", "b"),
    ("str:1:a",),
]


def test_parts_that_look_alike_give_different_keys() -> None:
    assert len({generate_idempotency_key(*parts) for parts in LOOKALIKES}) == len(LOOKALIKES)


class Currency(StrEnum):
    EUR = "EUR"


@pytest.mark.parametrize("part", [object(), {"a": 1}, [1], (1,), {1}, Currency.EUR, int, 1j, bytearray(b"a")])
def test_a_part_whose_text_may_change_is_refused_by_its_type(part: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(part).__name__}"):
        generate_idempotency_key("pay", part)


def test_a_refused_part_is_not_quoted() -> None:
    with pytest.raises(TypeError) as told:
        generate_idempotency_key("pay", {"card": "4111"})  # type: ignore[arg-type]

    assert "4111" not in str(told.value)


def test_no_parts_are_refused() -> None:
    with pytest.raises(TypeError, match="at least one part"):
        generate_idempotency_key()


def test_text_that_utf_8_cannot_hold_has_a_key_too() -> None:
    assert generate_idempotency_key("\ud800") != generate_idempotency_key("\ud801")
