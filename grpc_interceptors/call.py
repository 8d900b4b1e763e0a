"""Floor 4: from an RPC to a call. Reads the metadata once; serialises a request only where a policy asks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from grpc_interceptors.incoming import Incoming
from resilience.call import Call
from resilience.errors import PayloadTooLargeError

Pairs = Sequence[tuple[str, str | bytes]]


class InvocationMetadata:
    """What the client sent beside the message. Of a name that is sent twice, the first counts."""

    __slots__ = ("_pairs", "get", "sent")

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        first = {name: value if type(value) is str else _text(value) for name, value in reversed(pairs)}
        self.sent: Mapping[str, str] = first
        """The first value of each name."""
        self.get: Callable[[str], str | None] = first.get
        """Return the first value sent under a name, or None."""

    def get_all(self, name: str) -> list[str]:
        """Return every value sent under ``name``, in order."""
        return [_text(value) for key, value in self._pairs if key == name]


def call_from_context(method: str, pairs: Pairs, peer: str, request: Any, *, streaming: bool, safe: bool) -> Call:
    """Build the call of one RPC.

    Args:
        method: the full name, ``/pkg.Service/Method``; a registered one.
        pairs: the invocation metadata.
        peer: as ``ServicerContext.peer()`` tells it.
        request: the message, one to wait for, or the iterator of a request stream.
        streaming: True unless both sides send one message.
        safe: True where the method declares NO_SIDE_EFFECTS.
    """
    return Call(
        "grpc",
        method,
        InvocationMetadata(pairs),
        peer=address_of(peer),
        streaming=streaming,
        safe=safe,
        payload=partial(_payload, request),
    )


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def address_of(peer: str) -> str | None:
    """Return the address in a peer: ``ipv4:10.0.0.1:5000``, ``ipv6:[::1]:5000`` (percent-encoded or not), else None."""
    if peer.startswith("ipv4:"):
        return peer[5 : peer.rfind(":")]
    if peer.startswith("ipv6:"):
        return unquote(peer[5:]).rpartition(":")[0].strip("[]")
    return None


async def _payload(request: Any, limit: int) -> bytes:
    if isinstance(request, Incoming):
        request = await request.message()
    # The wire's own bytes won't do: equal messages of two clients may order a map differently.
    serialize = getattr(request, "SerializeToString", None)
    data: bytes = serialize(deterministic=True) if serialize is not None else bytes(request)
    if len(data) > limit:
        raise PayloadTooLargeError(limit)
    return data
