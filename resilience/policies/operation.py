"""Floor 2: what a handler may know of the keyed operation that it runs."""

from datetime import date
from decimal import Decimal
from uuid import UUID

from resilience.admission import running_admission
from resilience.decisions.idempotency import generate_idempotency_key


class RunningOperation:
    """One run of a keyed operation. Get it with ``running_operation()``.

    Args:
        name: of the operation: what its policy calls it, else what the door does.
        key: of its record: 64 hex digits, the same in every run of the operation.
        epoch: 1 in the first run, one more each time that the key of a worker that vanished is taken over, and in
            the runs after that: a fencing token for the handler's own writes. 0 where the store was gone and the
            policy ran it all the same.
        lost: whether the operation is known not to hold its key any more, so that another worker may run it, too.
    """

    __slots__ = ("epoch", "key", "known", "lost", "name", "result")

    def __init__(self, name: str, key: str, epoch: int, *, lost: bool = False) -> None:
        self.name = name
        self.key = key
        self.epoch = epoch
        self.lost = lost
        self.result: bytes | None = None
        """What ``@operation`` wants kept of this run."""
        self.known: bytes | None = None
        """What it kept of the first run, which came through another door; there is no run of it in this call."""

    def derive_key(self, purpose: str, *parts: str | float | bool | bytes | Decimal | UUID | date | None) -> str:
        """Return an idempotency key for a call that the handler makes: the same in every run of the operation.

        Args:
            purpose: whom or what the key is for, as ``"psp"``; each has a key of its own.
            parts: what tells several calls of one purpose apart. See ``generate_idempotency_key``.

        Returns:
            64 hex digits, which tell nothing of the client's own key.

        Raises:
            TypeError: a part is of a type whose text is not the same in every process.
        """
        return generate_idempotency_key("derived", self.key, purpose, *parts)

    def note_loss(self) -> None:
        """Note that the key is no longer held."""
        self.lost = True


def running_operation() -> RunningOperation | None:
    """Return the keyed operation that the running call was admitted to run; None in a call without a key.

    Where several policies hold a key for the call, it is the one of the policy that was asked last.
    """
    admission = running_admission()
    operation = admission.operation if admission is not None else None
    return operation if isinstance(operation, RunningOperation) else None
