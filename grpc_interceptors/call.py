"""Floor 4: from an RPC to a call. Reads the metadata once; serialises a request only where a policy asks."""

from collections.abc import Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from grpc_interceptors.incoming import Incoming
from resilience.call import Call
from resilience.errors import PayloadTooLargeError

Pairs = Sequence[tuple[str, str | bytes]]


class InvocationMetadata:
    """What the client sent beside the message. Of a name that is sent twice, the first counts."""

    __slots__ = ("_first", "_pairs")

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._first: dict[str, str | bytes] | None = None

    def get(self, name: str) -> str | None:
        """Return the first value sent under ``name``, or None."""
        if self._first is None:
            self._first = dict(reversed(self._pairs))
        value = self._first.get(name)
        return value.decode("latin-1") if isinstance(value, bytes) else value

    def get_all(self, name: str) -> list[str]:
        """Return every value sent under ``name``, in order."""
        found = (value for key, value in self._pairs if key == name)
        return [value.decode("latin-1") if isinstance(value, bytes) else value for value in found]


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


def address_of(peer: str) -> str | None:
    """Return the address in a peer: ``ipv4:10.0.0.1:5000``, ``ipv6:[::1]:5000`` (percent-encoded or not), else None."""
    kind, _, rest = peer.partition(":")
    if kind == "ipv4":
        return rest.rpartition(":")[0]
    if kind == "ipv6":
        return unquote(rest).rpartition(":")[0].strip("[]")
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
