from resilience.call import UNMATCHED, Call
from resilience.errors import (
    ConfigurationError,
    ForeignValueError,
    PayloadTooLargeError,
    ResilienceError,
    StoreUnavailableError,
)
from resilience.verdict import PROCEED, Outcome, Proceed


class Nothing:
    def __init__(self) -> None:
        self.sent: dict[str, str] = {}

    def get(self, _name: str) -> str | None:
        return None

    def get_all(self, _name: str) -> list[str]:
        return []


def test_an_operation_may_be_told_at_once() -> None:
    assert Call("http", "POST /orders", Nothing()).operation == "POST /orders"


async def test_a_call_without_a_payload_has_an_empty_one() -> None:
    call = Call("grpc", UNMATCHED, Nothing())
    assert await call.payload(0) == b""
    assert call.resource() == ""
    assert (call.peer, call.streaming, call.safe) == (None, False, False)


async def test_a_call_keeps_what_its_door_gave_it() -> None:
    async def payload(limit: int) -> bytes:
        return b"x" * limit

    call = Call(
        "http", "GET /", Nothing(), peer="10.0.0.1", streaming=True, safe=True, payload=payload, resource="id=1"
    )
    assert await call.payload(3) == b"xxx"
    assert call.resource() == "id=1"
    assert (call.protocol, call.peer, call.streaming, call.safe) == ("http", "10.0.0.1", True, True)


def test_every_accident_has_one_base() -> None:
    errors: list[ResilienceError] = [ConfigurationError("x"), StoreUnavailableError("x"), PayloadTooLargeError(1)]
    assert [str(error) for error in errors] == ["x", "x", "The payload is larger than 1 bytes."]
    assert isinstance(errors[0], ValueError)


def test_a_payload_that_is_too_large_tells_the_bound() -> None:
    assert PayloadTooLargeError(17).limit == 17


def test_a_foreign_value_tells_its_key_and_what_to_do() -> None:
    error = ForeignValueError("r:0123")
    assert isinstance(error, ResilienceError)
    assert error.key == "r:0123"
    assert "Delete it, or use another prefix" in str(error)


def test_values_are_equal_by_what_they_hold() -> None:
    assert Proceed() == PROCEED
    assert Outcome("failed") == Outcome("failed", None)
    assert Outcome("failed") != Outcome("cancelled")
