"""Floor 4: trailers: name and value pairs, and what grpc makes of them."""

import re
from collections.abc import Iterable

Trailers = Iterable[tuple[str, str | bytes]]
Pairs = tuple[tuple[str, str | bytes], ...]

STATUS_DETAILS = "grpc-status-details-bin"
"""The trailer with a serialised ``google.rpc.Status``; a client reads it only where it agrees with code and message."""

_NAME, _VALUE = re.compile(r"[0-9a-z_.-]+"), re.compile(r"[ -~]*")


def checked(metadata: Trailers) -> Pairs:
    """Return what a handler wants to send; grpc would take anything, and end the RPC as if the client had left.

    Source: "gRPC over HTTP2", Custom-Metadata.

    Raises:
        ValueError: a name or a value can't be sent.
    """
    pairs = tuple(metadata)
    for name, value in pairs:
        if name.endswith("-bin"):
            legal = isinstance(value, bytes)
        else:
            legal = _VALUE.fullmatch(value.decode("latin-1") if isinstance(value, bytes) else value) is not None
        if not (legal and _NAME.fullmatch(name)):
            raise ValueError(f"The metadata {name!r} can't be sent: its name or its value is illegal")
    return pairs


def merged(below: Pairs, above: Pairs) -> Pairs:
    """Return both; of a name in both, only what is above."""
    if not above or not below:
        return above or below
    names = {name for name, _ in above}
    return (*(pair for pair in below if pair[0] not in names), *above)
