"""Floor 4: from a reply to its bytes, as grpc does it, but that it must be bytes in the end."""

from typing import Any


def bytes_of(message: Any, serializer: Any) -> bytes:
    """Return the bytes of a reply.

    Raises:
        TypeError: ``serializer`` made something else of it; and whatever ``serializer`` raises.
    """
    if serializer is None or serializer is bytes:  # bytes(7) would be seven zeros
        data = message.encode() if isinstance(message, str) else message  # as grpc does
    else:
        data = serializer(message)
    if type(data) is not bytes:
        raise TypeError(f"A reply must become bytes, not {type(data).__name__}")
    return data
