"""Floor 4: request bytes that are no message: told in our words, since grpc would tell the client the decoder's own."""

from collections.abc import Callable
from typing import Any

import grpc

from resilience.errors import ResilienceError


class Malformed:
    """Stands where the message of a unary request would. Interceptors before ours may see it; handlers never do.

    Args:
        data: what arrived instead.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        # So that a limit whose cost is a matter of the payload counts garbage, too.
        return self._data


class MalformedRequestError(ResilienceError):
    """A client broke the contract of the method's requests; ends its RPC with ``code`` and the message, which is fixed.

    Args:
        code: the status to end with.
        message: what to tell the client; nothing that it sent.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def undecodable() -> MalformedRequestError:
    """Return the error of bytes that are no message.

    Source: grpc/grpc, doc/statuscodes.md: "Error parsing request proto", INTERNAL, by the server.
    """
    return MalformedRequestError(grpc.StatusCode.INTERNAL, "The request can't be decoded")


def missing() -> MalformedRequestError:
    """Return the error of a client that ends its side without the one message that the method takes.

    Source: grpc/grpc, doc/statuscodes.md: "Request cardinality violation", UNIMPLEMENTED, by the server.
    """
    return MalformedRequestError(grpc.StatusCode.UNIMPLEMENTED, "This method takes exactly one message")


def decoder(deserializer: Callable[[bytes], Any] | None, *, streams: bool) -> Callable[[bytes], Any] | None:
    """Return what grpc shall decode requests with, or None for raw bytes.

    Args:
        deserializer: the handler's own.
        streams: whether the client sends many messages. Then a broken one raises where the handler reads it; a lone
            one comes before anybody was asked, and is passed on as ``Malformed``.
    """
    if deserializer is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserializer(data)
        except Exception as error:
            if streams:
                raise undecodable() from error
            return Malformed(data)

    return decode
