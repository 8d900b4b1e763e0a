"""Floor 1: the idempotency half of the embedded default. No tasks, no threads; every method runs without a pause.

A record may not be forgotten before its time, so at the bound a new claim is refused.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from resilience.decisions.idempotency import Claim, Claimed, Takeover, decide_claim, decide_step
from resilience.decisions.idempotency_record import (
    Record,
    Standing,
    claimed,
    completed,
    next_epoch,
    released,
    resolution,
    stand,
)
from resilience.errors import StoreUnavailableError
from resilience.verdict import Reply

_LOOKED_AT = 4  # Old records that each new one looks at: expiry keeps pace with growth, at a flat cost.
_LOOKED_AT_WHEN_FULL = 256
_RECORD_BYTES = 600  # About what CPython spends on a record beside its reply's body.


class MemoryRecords:
    """Keeps records in this process's memory.

    Args:
        clock: seconds that never step back.
        max_record_bytes: how much the records may take, in bytes.
    """

    def __init__(self, clock: Callable[[], float], max_record_bytes: int) -> None:
        self._clock = clock
        self._max_record_bytes = max_record_bytes
        # When each is gone, and itself; ordered by when it was last looked at, so that a look takes from the front.
        self._records: OrderedDict[str, tuple[float, Record]] = OrderedDict()
        self._record_bytes = 0

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        """Ask to run the operation under ``key``. See ``IdempotencyStore``."""
        now = self._clock()
        record = self._find(key, now)
        answer = decide_claim(record, token, fingerprint, takeover, lease, now)
        if isinstance(answer, Claimed):
            if record is None:
                self._expire_records(now, _LOOKED_AT)
                if self._record_bytes + _RECORD_BYTES > self._max_record_bytes:
                    self._expire_records(now, _LOOKED_AT_WHEN_FULL)
                if self._record_bytes + _RECORD_BYTES > self._max_record_bytes:
                    raise StoreUnavailableError(
                        f"The memory store holds {self._max_record_bytes} bytes of idempotency records, its bound. "
                        "Raise max_record_bytes, shorten the ttl, or keep records in Redis."
                    )
            self._put(key, claimed(token, answer.epoch, fingerprint, lease=lease, ttl=ttl, now=now), now + ttl)
        return answer

    async def renew(self, key: str, token: str, *, lease: float, ttl: float) -> bool:
        """Extend the owner's lease. See ``IdempotencyStore``."""
        now = self._clock()
        record = self._find(key, now)
        row = decide_step("renew", record, token, now)
        if record is None or row.answer == "no":
            return False
        renewed = claimed(token, next_epoch(row, record), record.fingerprint, lease=lease, ttl=ttl, now=now)
        self._put(key, renewed, now + ttl)
        return True

    async def complete(
        self, key: str, token: str, fingerprint: bytes, reply: Reply | None, *, ttl: float, tombstone: float = 0.0
    ) -> bool:
        """Keep the answer for ``ttl`` seconds. See ``IdempotencyStore``."""
        now = self._clock()
        record = self._find(key, now)
        row = decide_step("complete", record, token, now)
        if row.answer == "yes":
            kept = self._fitting(reply, record)
            done = completed(token, next_epoch(row, record), fingerprint, kept, ttl=ttl, now=now)
            self._put(key, done, now + ttl + tombstone)
        return row.answer == "yes"

    async def release(self, key: str, token: str) -> bool:
        """Free the key so that a retry runs. See ``IdempotencyStore``."""
        now = self._clock()
        record = self._find(key, now)
        row = decide_step("release", record, token, now)
        if row.then == "absent":
            self._drop(key)
        elif record is not None and row.then == "released":
            left = released(record, now)
            self._put(key, left, left.ttl_until)
        return row.answer == "yes"

    async def inspect(self, key: str) -> Standing | None:
        """Tell how the record stands. See ``IdempotencyStore``."""
        now = self._clock()
        record = self._find(key, now)
        return stand(record, self._records[key][0], now) if record is not None else None

    async def forget(self, key: str) -> bool:
        """Free the key for good. See ``IdempotencyStore``."""
        now = self._clock()
        row = decide_step("forget", self._find(key, now), "", now)
        if row.then == "absent":
            self._drop(key)
        return row.answer == "yes"

    async def resolve(self, key: str, reply: Reply | None, *, ttl: float, tombstone: float = 0.0) -> bool:
        """Answer for an owner that is gone. See ``IdempotencyStore``."""
        now = self._clock()
        record, token = self._find(key, now), resolution(reply)
        row = decide_step("resolve", record, token, now)
        if record is not None and row.then == "completed":
            kept = self._fitting(reply, record)
            done = completed(token, next_epoch(row, record), record.fingerprint, kept, ttl=ttl, now=now)
            self._put(key, done, now + ttl + tombstone)
        return row.answer == "yes"

    def _find(self, key: str, now: float) -> Record | None:
        held = self._records.get(key)
        if held is None:
            return None
        if held[0] <= now:
            self._drop(key)
            return None
        if held[1].done and held[1].ttl_until <= now:
            self._bury(key)
        return held[1]

    def _fitting(self, reply: Reply | None, record: Record | None) -> Reply | None:
        """Return the reply if there is room for it in the place of what ``record`` holds."""
        room = self._max_record_bytes - self._record_bytes + (0 if record is None else _size(record) - _RECORD_BYTES)
        return reply if reply is None or _weight(reply) <= room else None

    def _bury(self, key: str) -> None:
        """Keep the key, without the reply that its ttl has outlived."""
        _, record = self._records[key]
        self._record_bytes -= _size(record) - _RECORD_BYTES
        record.reply = None

    def _put(self, key: str, record: Record, expires_at: float) -> None:
        self._drop(key)
        self._records[key] = (expires_at, record)
        self._record_bytes += _size(record)

    def _drop(self, key: str) -> None:
        held = self._records.pop(key, None)
        if held is not None:
            self._record_bytes -= _size(held[1])

    def _expire_records(self, now: float, most: int) -> None:
        for key in list(islice(self._records, most)):
            expires_at, record = self._records[key]
            if expires_at > now:
                self._records.move_to_end(key)
                if record.ttl_until <= now:
                    self._bury(key)
            else:
                self._drop(key)


def _size(record: Record) -> int:
    return _RECORD_BYTES + (_weight(record.reply) if record.reply is not None else 0)


def _weight(reply: Reply) -> int:
    return (
        len(reply.body) + len(reply.result or b"") + sum(len(name) + len(value) + 100 for name, value in reply.metadata)
    )
