"""Floor 4: from an RPC to a call. Reads the metadata once; serialises a request only where a policy asks."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from grpc_interceptors.incoming import Incoming
from resilience import wire
from resilience.call import UNMATCHED, Call
from resilience.errors import PayloadTooLargeError

Pairs = Sequence[tuple[str, str | bytes]]

_PEERS = 4096  # Connections whose addresses are remembered: each is long-lived, and has many calls.


class InvocationMetadata:
    """What the client sent beside the message. Of a name that is sent twice, the first counts."""

    __slots__ = ("_pairs", "sent")

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        sent: dict[str, str] = {}
        for name, value in pairs:  # no comprehension, which is a call: half of the cost
            if name in wire.SENT and name not in sent:
                sent[name] = _text(value)
        self.sent: Mapping[str, str] = sent
        """The first value of each name that nearly every call is asked for."""

    def get(self, name: str) -> str | None:
        """Return the first value sent under ``name``, or None."""
        if name in wire.SENT:
            return self.sent.get(name)
        for key, value in self._pairs:
            if key == name:
                return _text(value)
        return None

    def get_all(self, name: str) -> list[str]:
        """Return every value sent under ``name``, in order."""
        return [_text(value) for key, value in self._pairs if key == name]


class GrpcCall(Call):
    """One RPC. What nobody asks for is not worked out.

    Args:
        method: the full name, ``/pkg.Service/Method``; a registered one.
        pairs: the invocation metadata.
        peer: as ``ServicerContext.peer()`` tells it.
        request: the message, one to wait for, or the iterator of a request stream.
        streaming: True unless both sides send one message.
        safe: True where the method declares NO_SIDE_EFFECTS.
    """

    protocol = "grpc"
    operation = UNMATCHED
    _resource = ""

    def __init__(
        self, method: str, pairs: Pairs, peer: str, request: Any, *, streaming: bool = False, safe: bool = False
    ) -> None:
        self.operation = method
        self.metadata = InvocationMetadata(pairs)
        self.peer = address_of(peer)
        self._request = request
        if streaming:
            self.streaming = True
        if safe:
            self.safe = True

    async def payload(self, limit: int) -> bytes:
        """Serialise the message; wait for it, where it has yet to come. See ``Call.payload``."""
        request = self._request
        if isinstance(request, Incoming):
            request = await request.message()
        # The wire's own bytes won't do: equal messages of two clients may order a map differently.
        serialize = getattr(request, "SerializeToString", None)
        data: bytes = serialize(deterministic=True) if serialize is not None else bytes(request)
        if len(data) > limit:
            raise PayloadTooLargeError(limit)
        return data


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


@lru_cache(_PEERS)
def address_of(peer: str) -> str | None:
    """Return the address in a peer: ``ipv4:10.0.0.1:5000``, ``ipv6:[::1]:5000`` (percent-encoded or not), else None."""
    if peer.startswith("ipv4:"):
        return peer[5 : peer.rfind(":")]
    if peer.startswith("ipv6:"):
        return unquote(peer[5:]).rpartition(":")[0].strip("[]")
    return None
