"""Floor 2: a keyed operation runs once, and its retries get its reply."""

import logging
from secrets import token_hex
from typing import Literal

from resilience import wire
from resilience.admission import Admission
from resilience.call import Call
from resilience.decisions.fingerprint import fingerprint
from resilience.decisions.idempotency import (
    Abandoned,
    Claim,
    Claimed,
    Completed,
    InProgress,
    Mismatched,
    Takeover,
    accept_key,
    record_key,
)
from resilience.errors import ConfigurationError, PayloadTooLargeError, StoreUnavailableError
from resilience.policies.heartbeat import Heartbeat
from resilience.policies.outage import Outage
from resilience.stores.base import IdempotencyStore
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Verdict
from resilience.wire import Reason

logger = logging.getLogger("resilience")

MAX_PAYLOAD = 2**20
"""Bytes of a keyed call's payload, by default: what a door must be able to show to a policy that asks late."""
_TRY_AGAIN = 1.0  # Seconds that a caller is asked to wait when the store is gone.


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
        lease: seconds until the key of a dead worker can be taken over, at least 1; renewed while the handler runs.
        takeover: ``reexecute`` runs an abandoned operation again; ``refuse`` answers ``idempotency_abandoned``.
        on_outage: what callers see while the store is gone: ``closed`` refuses keyed calls, ``open`` runs them
            unprotected.
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
        lease: float = 30.0,
        takeover: Takeover = "reexecute",
        on_outage: Literal["closed", "open"] = "closed",
        max_payload: int = MAX_PAYLOAD,
        max_reply: int = 2**20,
    ) -> None:
        if not 1 <= lease <= ttl:
            raise ConfigurationError(f"An idempotency lease must be 1 second to the ttl ({ttl:g}), not {lease:g}.")
        if max_payload < 1 or max_reply < 1:
            raise ConfigurationError("max_payload and max_reply must be at least 1 byte.")
        self.store = store
        self._operation = operation
        self.required = required
        self._ttl = ttl
        self._lease = lease
        self.takeover: Takeover = takeover
        self.on_outage = on_outage
        self._max_payload = max_payload
        self._max_reply = max_reply
        self._outage = Outage(f"keyed calls {'run unprotected' if on_outage == 'open' else 'are refused'}")
        self._heartbeat = Heartbeat(store, lease, ttl)

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        """Claim the key, or answer for the one who has it."""
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
        return await self._claim(name, print_, call, admission)

    async def _claim(self, key: str, print_: bytes, call: Call, admission: Admission) -> Verdict:
        token = token_hex(16)
        try:
            claim = await self.store.claim(key, token, print_, lease=self._lease, ttl=self._ttl, takeover=self.takeover)
        except StoreUnavailableError as error:
            self._outage.began(error)
            if self.on_outage == "open":
                return PROCEED
            return Reject(Reason.STORE_UNAVAILABLE, "The service can't protect this request right now", _TRY_AGAIN)
        self._outage.ended()
        if not isinstance(claim, Claimed):
            return _answer(claim, call, admission)
        self._heartbeat.hold(key, token)
        admission.claimed += (key,)
        admission.capture = max(admission.capture, self._max_reply)

        async def settle(outcome: Outcome) -> None:
            await self._settle(key, token, print_, outcome)

        admission.on_settle(settle)
        return PROCEED

    async def _settle(self, key: str, token: str, print_: bytes, outcome: Outcome) -> None:
        self._heartbeat.drop(token)
        try:
            if outcome.ended == "completed":
                reply = outcome.reply
                if reply is not None and len(reply.body) > self._max_reply:
                    reply = None
                if not await self.store.complete(key, token, print_, reply, ttl=self._ttl):
                    logger.warning("A reply was not stored: another worker took the idempotency key over")
            elif outcome.ended != "cancelled":
                await self.store.release(key, token)
            # A cancelled operation may have done half of its work: its key waits for the lease, like a dead worker's.
        except StoreUnavailableError as error:
            # The operation is done and its reply leaves unchanged: an error now would ask the client to retry it.
            logger.warning("A finished operation could not be recorded: %s", error)


def _answer(claim: Claim, call: Call, admission: Admission) -> Verdict:
    match claim:
        case Completed(reply) if reply is not None and reply.protocol == call.protocol:
            admission.metadata.append((wire.REPLAYED, "true"))
            return Replay(reply)
        case Completed():
            return Reject(Reason.IDEMPOTENCY_NOT_REPLAYABLE, "This operation is done; its reply can't be shown here")
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
