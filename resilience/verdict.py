"""Ground floor: what a policy can answer, and how a call can end. Values only."""

from dataclasses import dataclass
from typing import Literal

from resilience.call import Protocol
from resilience.wire import Reason


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer: what a store can keep and the same door can send again.

    Args:
        protocol: the door whose bytes these are.
        code: HTTP status, or gRPC status code as its number.
        metadata: name and value pairs in order, duplicates kept, names lower-case.
        body: the exact bytes; for a gRPC error, its message in UTF-8.
        result: what the operation itself returned, as its codec wrote it, from which another door can make its own
            reply; None where it has no codec.
    """

    protocol: Protocol
    code: int
    metadata: tuple[tuple[str, str], ...]
    body: bytes
    result: bytes | None = None


@dataclass(frozen=True, slots=True)
class Proceed:
    """Nothing stands against the call."""


@dataclass(frozen=True, slots=True)
class Reject:
    """The call is refused, by the row of ``wire.TABLE`` that ``reason`` names.

    Args:
        message: goes to the client as it is, so it holds no internals and nothing the client sent.
        retry_after: seconds until a retry can succeed, > 0; None where waiting alone won't help.
    """

    reason: Reason
    message: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """The call was answered before; send that answer again."""

    reply: Reply


Verdict = Proceed | Reject | Replay

PROCEED = Proceed()
"""The only Proceed there is a use for; compare with ``is``."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended, told to every settle hook.

    Args:
        ended: ``completed``: with a final answer, a domain error included. ``failed``: with one that a
            retry may better. ``cancelled``: cut off, so that nobody knows. ``refused``: by one of our policies.
        reply: the answer, where a policy asked for it (``admission.capture``) and it fitted the bound.
    """

    ended: Literal["completed", "failed", "cancelled", "refused"]
    reply: Reply | None = None
