"""Floor 2: a keyed operation runs once, and its retries get its reply."""

import logging
from dataclasses import replace
from functools import partial
from math import inf
from typing import Literal

from resilience import wire
from resilience.admission import Admission
from resilience.call import Call, Protocol
from resilience.decisions.fingerprint import fingerprint
from resilience.decisions.idempotency import (
    LONGEST_HINT,
    Abandoned,
    Claim,
    Claimed,
    Completed,
    Expired,
    InProgress,
    Mismatched,
    Takeover,
    accept_key,
    record_key,
)
from resilience.errors import ConfigurationError, PayloadTooLargeError, StoreUnavailableError
from resilience.policies.completion import LateCompletions
from resilience.policies.heartbeat import Heartbeat
from resilience.policies.operation import RunningOperation
from resilience.policies.outage import Outage
from resilience.policies.request_context import IdMint
from resilience.policies.waiting import OnTwin, WaitingRoom
from resilience.stores.base import IdempotencyStore
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Reply, Verdict
from resilience.wire import Reason

logger = logging.getLogger("resilience")

MAX_PAYLOAD = 2**20
"""Bytes of a keyed call's payload, by default: what a door must be able to show to a policy that asks late."""
_TRY_AGAIN = 1.0  # Seconds that a caller is asked to wait when the store is gone.
_DOORS_OWN: dict[Protocol, OnTwin] = {"http": "reject", "grpc": "wait"}
_MARGIN = 0.2  # Seconds before the caller's deadline at which a wait ends, so that its answer still arrives.


class IdempotencyPolicy:
    """Runs a keyed call at most once at a time, and answers its retries with the first's reply.

    Applies to calls that carry ``idempotency-key``; others pass, unless ``required``. A key is the caller's own: two
    callers who send the same one never meet. What can't be promised: a worker that dies after the side effect and
    before the reply is stored leaves a key whose operation may run again (``takeover``).

    Args:
        store: where the records are.
        operation: one name for the same operation behind both doors, so that a key can't run once behind
            each. By default each door's own name counts.
        required: refuse calls without a key.
        ttl: seconds that a reply is kept, at least ``lease``.
        tombstone: seconds, at least 0, for which a key is remembered after its reply was let go: a call with it is told
            ``idempotency_not_replayable`` then, where else it would run again.
        lease: seconds until the key of a dead worker can be taken over, at least 1; renewed while the handler runs.
        takeover: ``reexecute`` runs an abandoned operation again; ``refuse`` answers ``idempotency_abandoned``.
        on_outage: what callers see while the store is gone: ``closed`` refuses keyed calls, ``open`` runs them
            unprotected; but never one that was waiting for its twin.
        in_progress: what a call does whose twin runs: ``reject`` tells it at once when to come back, ``wait`` keeps it
            until the twin's reply is there. By default a request over HTTP is rejected and an RPC waits.
        max_wait: seconds that a call waits at most, > 0; less where its own deadline comes first.
        max_payload: bytes; a keyed call with a larger payload is refused.
        max_reply: bytes; a larger reply is sent, but its retries are told ``idempotency_not_replayable``.

    Raises:
        ConfigurationError: a value is out of range.
    """

    def __init__(
        self,
        store: IdempotencyStore,
        *,
        operation: str | None = None,
        required: bool = False,
        ttl: float = 86_400.0,
        tombstone: float = 0.0,
        lease: float = 30.0,
        takeover: Takeover = "reexecute",
        on_outage: Literal["closed", "open"] = "closed",
        in_progress: OnTwin | None = None,
        max_wait: float = 30.0,
        max_payload: int = MAX_PAYLOAD,
        max_reply: int = 2**20,
    ) -> None:
        if not 1 <= lease <= ttl:
            raise ConfigurationError(f"An idempotency lease must be 1 second to the ttl ({ttl:g}), not {lease:g}.")
        if not 0 <= tombstone < inf:
            raise ConfigurationError(f"tombstone must be at least 0 seconds and finite, not {tombstone:g}.")
        if max_payload < 1 or max_reply < 1:
            raise ConfigurationError("max_payload and max_reply must be at least 1 byte.")
        if not 0 < max_wait < inf:
            raise ConfigurationError(f"max_wait must be over 0 seconds and finite, not {max_wait:g}.")
        self.store = store
        self._operation = operation
        self.required = required
        self.needs = None if required else wire.IDEMPOTENCY_KEY
        """The metadata without which a call is none of this policy's business; None where there is no such."""
        self._ttl = ttl
        self._tombstone = tombstone
        self._lease = lease
        self.takeover: Takeover = takeover
        self.on_outage = on_outage
        self.in_progress = in_progress
        self._max_wait = max_wait
        self._max_payload = max_payload
        self._max_reply = max_reply
        self._outage = Outage(f"keyed calls {'run unprotected' if on_outage == 'open' else 'are refused'}")
        self._mint = IdMint()
        self._heartbeat = Heartbeat(store, lease, ttl)
        self._room = WaitingRoom(self._ask, store.release)
        self._late = LateCompletions(self._complete, store.release, self._heartbeat, ttl, self._room.wake)

    async def admit(self, call: Call, admission: Admission, *, may_wait: bool = True) -> Verdict:
        """Claim the key, or answer for the one who has it.

        Args:
            may_wait: False where waiting for a twin would keep others from running.
        """
        if call.metadata.get(wire.IDEMPOTENCY_KEY) is None:
            if self.required and not call.safe:
                return Reject(Reason.IDEMPOTENCY_KEY_MISSING, "This operation needs an Idempotency-Key")
            return PROCEED
        if call.safe:
            return PROCEED
        if call.streaming:
            return Reject(Reason.IDEMPOTENCY_KEY_MALFORMED, "This operation streams and can't take an Idempotency-Key")
        key = accept_key(call.metadata.get_all(wire.IDEMPOTENCY_KEY))
        if key is None:
            return Reject(
                Reason.IDEMPOTENCY_KEY_MALFORMED,
                "Send one Idempotency-Key of 1 to 255 visible ASCII characters, without quotes or backslashes inside",
            )
        try:
            print_ = fingerprint(call.protocol, call.resource(), await call.payload(self._max_payload))
        except PayloadTooLargeError as error:
            return Reject(Reason.PAYLOAD_TOO_LARGE, f"A request with an Idempotency-Key may have {error.limit} bytes")
        operation = self._operation or call.operation
        name = record_key("", operation, admission.caller(), key)
        if name in admission.claimed:
            return PROCEED  # a policy further out holds it, for this very call
        running = RunningOperation(operation, name, 0, lost=True)  # until the store has said otherwise
        return await self._claim(running, print_, call, admission, self._patience(call, admission) if may_wait else 0.0)

    async def _claim(
        self, operation: RunningOperation, print_: bytes, call: Call, admission: Admission, patience: float
    ) -> Verdict:
        key = operation.key
        token = self._mint()
        claim: Claim = InProgress(LONGEST_HINT)  # so it was for those who wait by now
        if patience <= 0 or not self._room.is_watched(key, print_):
            try:
                claim = await self._ask(key, token, print_)
            except StoreUnavailableError as error:
                self._outage.began(error)
                if self.on_outage == "closed":
                    return _unprotected()
                admission.operation = operation
                return PROCEED
            self._outage.ended()
        if patience > 0 and isinstance(claim, InProgress):
            try:
                token, claim = await self._room.wait(key, print_, claim, patience)
            except StoreUnavailableError as error:
                # A twin ran when the store was last seen: whatever the policy says, this one must not.
                self._outage.began(error)
                return _unprotected()
        if not isinstance(claim, Claimed):
            return _answer(claim, call, admission, operation)
        operation.epoch, operation.lost = claim.epoch, False
        self._heartbeat.hold(key, token, operation.note_loss)
        admission.operation = operation
        admission.claimed += (key,)
        admission.capture = max(admission.capture, self._max_reply)
        admission.on_settle(partial(self._settle, operation, token, print_))
        return PROCEED

    def _patience(self, call: Call, admission: Admission) -> float:
        """Return for how many seconds a call waits for its twin; 0 or less where it does not."""
        if (self.in_progress or _DOORS_OWN[call.protocol]) == "reject":
            return 0.0
        left = admission.context.remaining()
        return self._max_wait if left is None else min(self._max_wait, left - min(_MARGIN, left / 5))

    async def _ask(self, key: str, token: str, print_: bytes) -> Claim:
        try:
            return await self.store.claim(key, token, print_, lease=self._lease, ttl=self._ttl, takeover=self.takeover)
        except StoreUnavailableError:
            self._late.free(key, token)
            raise

    async def _complete(self, key: str, token: str, print_: bytes, reply: Reply | None, ttl: float) -> bool:
        return await self.store.complete(key, token, print_, reply, ttl=ttl, tombstone=self._tombstone)

    async def _settle(self, operation: RunningOperation, token: str, print_: bytes, outcome: Outcome) -> None:
        key = operation.key
        self._heartbeat.drop(token)
        if outcome.ended == "cancelled":
            return  # It may have done half of its work: its key waits for the lease, like a dead worker's.
        reply = outcome.reply
        if reply is not None and operation.result is not None:
            reply = replace(reply, result=operation.result)
        if reply is not None and len(reply.body) + len(reply.result or b"") > self._max_reply:
            reply = None
        try:
            if outcome.ended == "completed":
                if not await self._complete(key, token, print_, reply, self._ttl):
                    logger.warning("A reply was not stored: another worker took the idempotency key over")
            else:
                await self.store.release(key, token)
        except StoreUnavailableError as error:
            # The operation is done and its reply leaves unchanged: an error now would ask the client to retry it.
            if outcome.ended != "completed":
                self._late.free(key, token)
                then = "its key is freed later"
            elif self._late.keep(key, token, print_, reply):
                then = "it is tried again in the background"
            else:
                then = "its key waits for the lease"
            logger.warning("A finished operation could not be recorded, so %s: %s", then, error)
        else:
            self._room.wake(key)


def _unprotected() -> Reject:
    return Reject(Reason.STORE_UNAVAILABLE, "The service can't protect this request right now", _TRY_AGAIN)


def _answer(claim: Claim, call: Call, admission: Admission, operation: RunningOperation) -> Verdict:
    match claim:
        case Completed(reply) if reply is not None and reply.protocol == call.protocol:
            admission.metadata.append((wire.REPLAYED, "true"))
            return Replay(reply)
        case Completed(reply) if reply is not None and reply.result is not None:
            # Another door's bytes are no use here; this door's handler makes its own of the operation's result.
            operation.known = reply.result
            admission.operation = operation
            admission.claimed += (operation.key,)
            admission.metadata.append((wire.REPLAYED, "true"))
            return PROCEED
        case Completed():
            return Reject(Reason.IDEMPOTENCY_NOT_REPLAYABLE, "This operation is done; its reply can't be shown here")
        case Expired():
            return Reject(Reason.IDEMPOTENCY_NOT_REPLAYABLE, "This operation is done; its reply is no longer kept")
        case InProgress(retry_after):
            message = "A request with this Idempotency-Key is in progress"
            return Reject(Reason.IDEMPOTENCY_IN_PROGRESS, message, retry_after)
        case Mismatched():
            message = "This Idempotency-Key was used with another request"
            return Reject(Reason.IDEMPOTENCY_PAYLOAD_MISMATCH, message)
        case Abandoned():
            message = "The worker that ran this operation vanished; ask the operator whether it took effect"
            return Reject(Reason.IDEMPOTENCY_ABANDONED, message)
        case Claimed():
            return PROCEED
