"""What stands in for a gRPC server around one call: of its shape, and next to free."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """One piece of metadata, of the shape that grpc gives it."""

    key: str
    value: str


class Details(NamedTuple):
    """Stands in for ``grpc.HandlerCallDetails``."""

    method: str
    invocation_metadata: tuple[Pair, ...]


class FreeContext:
    """Stands in for the servicer context, and costs next to nothing."""

    __slots__ = ("_metadata", "_peer", "trailers")

    def __init__(self, peer: str, metadata: tuple[Pair, ...]) -> None:
        self._peer = peer
        self._metadata = metadata
        self.trailers: Sequence[tuple[str, str]] = ()

    def peer(self) -> str:
        """Return who calls."""
        return self._peer

    def invocation_metadata(self) -> tuple[Pair, ...]:
        """Return what the client sent."""
        return self._metadata

    def set_trailing_metadata(self, trailers: Sequence[tuple[str, str]]) -> None:
        """Take the trailers."""
        self.trailers = trailers

    def time_remaining(self) -> float | None:
        """Return None: the client waits for ever."""
        return None


class Watched:
    """Counts what is asked of a context."""

    def __init__(self, context: FreeContext) -> None:
        self.asked: Counter[str] = Counter()
        self._context = context

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self._context, name)
