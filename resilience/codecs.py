"""Floor 3: an operation's result as bytes, so that another door can tell it again."""

from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Codec(Protocol[T]):
    """Turns a result into bytes, and these into an equal result; in any process, and after a deploy."""

    def encode(self, value: T) -> bytes:
        """Return the bytes of a result."""
        ...

    def decode(self, data: bytes) -> T:
        """Return the result; raise any exception where the bytes are none."""
        ...


class JsonCodec(Generic[T]):
    """A dataclass, a pydantic model, or anything else that pydantic can read and write, as JSON. Needs pydantic.

    Args:
        kind: the result's type.
    """

    def __init__(self, kind: type[T]) -> None:
        from pydantic import TypeAdapter  # noqa: PLC0415 - only who names a JsonCodec needs it

        self._adapter: TypeAdapter[T] = TypeAdapter(kind)

    def encode(self, value: T) -> bytes:
        """Return the value as JSON."""
        return self._adapter.dump_json(value)

    def decode(self, data: bytes) -> T:
        """Read the value; raises pydantic's ``ValidationError``."""
        return self._adapter.validate_json(data)


class MessageCodec(Generic[T]):
    """A protobuf message, in its own encoding.

    Args:
        kind: the message's class.
    """

    def __init__(self, kind: type[T]) -> None:
        self._kind: Any = kind

    def encode(self, value: T) -> bytes:
        """Return the message's bytes."""
        message: Any = value
        data: bytes = message.SerializeToString()
        return data

    def decode(self, data: bytes) -> T:
        """Parse the message; raises protobuf's ``DecodeError``."""
        message: T = self._kind.FromString(data)
        return message
