"""Floor 1: the idempotency half of the Redis store. Scripts decide, by the server's clock; this carries the words."""

from functools import partial
from hashlib import blake2b
from time import monotonic
from typing import Any, NoReturn

import hiredis

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
    differs,
)
from resilience.decisions.idempotency_record import Record, Standing, resolution, stand
from resilience.errors import ForeignValueError, StoreUnavailableError
from resilience.stores import record
from resilience.stores.link import Arguments
from resilience.stores.nodes import Nodes, Script, code_of
from resilience.stores.record import to_ms
from resilience.stores.sealing import Sealing
from resilience.verdict import Reply


class RedisRecords:
    """Keeps records in Redis. Who derives from it connects ``_nodes``, which are to know ``_scripts``.

    Args:
        prefix: what every key starts with.
        timeout: seconds that a step may take.
        sealing: what is kept of a reply, and of a fingerprint.
    """

    _nodes: Nodes

    def __init__(self, prefix: str, timeout: float, sealing: Sealing) -> None:
        self._prefix = prefix
        self._sealing = sealing
        self._record_timeout = timeout
        self._claim, self._renew, self._complete, self._release = map(Script, ("claim", "renew", "complete", "release"))
        self._inspect, self._forget, self._resolve = map(Script, ("inspect", "forget", "resolve"))
        self._scripts = [self._claim, self._renew, self._complete, self._release]
        self._scripts += [self._inspect, self._forget, self._resolve]

    async def claim(
        self, key: str, token: str, fingerprint: bytes, *, lease: float, ttl: float, takeover: Takeover
    ) -> Claim:
        """Ask to run the operation under ``key``. See ``IdempotencyStore``."""
        until = monotonic() + self._record_timeout
        name, owner = self._record_key(key), _token(token)
        asked = self._sealing.fingerprint(fingerprint)
        fresh = record.pack(done=False, token=owner, fingerprint=asked, lease=lease, ttl=ttl)
        if self._nodes.native_claim:
            command = ("SET", name, fresh, "NX", "GET", "PX", to_ms(ttl))
            raw = await self._call(name, command, self._record_timeout)
            if raw is None:
                return Claimed(1)
            stored = self._read(raw, name)
            asked = self._sealing.fingerprint_like(stored.fingerprint, fingerprint)
            if not stored.released and differs(stored.fingerprint, asked):
                return Mismatched()
            if stored.done and stored.span == stored.life:
                return Completed(stored.reply)
            # Somebody runs it, or has died of it, or asks again, or it is done and has a tombstone: only the server's
            # clock can tell. Or who took it over gave it back, and the epoch is to rise.
        arguments = (owner, asked, takeover, fresh, to_ms(ttl))
        kind, *rest = await self._run(self._claim, [name], arguments, until - monotonic())
        if kind == b"completed":
            stored = self._read(rest[0], name)
            # The script could not compare if another key than ours made it.
            asked = self._sealing.fingerprint_like(stored.fingerprint, fingerprint)
            return Mismatched() if differs(stored.fingerprint, asked) else Completed(stored.reply)
        return _answer(kind, rest, lease)

    async def renew(self, key: str, token: str, *, lease: float, ttl: float) -> bool:
        """Extend the owner's lease. See ``IdempotencyStore``."""
        return await self._step(self._renew, key, _token(token), to_ms(lease), to_ms(ttl))

    async def complete(
        self, key: str, token: str, fingerprint: bytes, reply: Reply | None, *, ttl: float, tombstone: float = 0.0
    ) -> bool:
        """Keep the answer for ``ttl`` seconds. See ``IdempotencyStore``.

        The reply stays on the server, though nobody is shown it, until the tombstone is out as well.
        """
        owner, kept = _token(token), self._sealing.fingerprint(fingerprint)
        done = self._done(key, owner, kept, reply, ttl, tombstone)
        return await self._step(self._complete, key, owner, done, to_ms(ttl + tombstone))

    async def release(self, key: str, token: str) -> bool:
        """Free the key so that a retry runs. See ``IdempotencyStore``."""
        return await self._step(self._release, key, _token(token))

    async def inspect(self, key: str) -> Standing | None:
        """Tell how the record stands. See ``IdempotencyStore``."""
        name = self._record_key(key)
        found = await self._run(self._inspect, [name], (), self._record_timeout)
        return _standing(self._read(found[0], name), found[1] / 1000) if found is not None else None

    async def forget(self, key: str) -> bool:
        """Free the key for good. See ``IdempotencyStore``."""
        return await self._step(self._forget, key)

    async def resolve(self, key: str, reply: Reply | None, *, ttl: float, tombstone: float = 0.0) -> bool:
        """Answer for an owner that is gone. See ``IdempotencyStore``."""
        operator = _token(self._sealing.token(resolution(reply)))
        # The script puts the fingerprint in that the record has.
        done = self._done(key, operator, b"", reply, ttl, tombstone)
        return await self._step(self._resolve, key, operator, done, to_ms(ttl + tombstone))

    def _record_key(self, key: str) -> str:
        return f"{self._prefix}:{{{key}}}:I"

    def _done(
        self, key: str, owner: bytes, fingerprint: bytes, reply: Reply | None, ttl: float, tombstone: float
    ) -> bytes:
        seal = partial(self._sealing.seal, name=self._record_key(key))
        return record.pack(
            done=True, token=owner, fingerprint=fingerprint, ttl=ttl, tombstone=tombstone, reply=reply, seal=seal
        )

    def _read(self, raw: bytes, name: str) -> record.Stored:
        stored = record.unpack(raw, partial(self._sealing.open, name=name))
        if stored is None:
            raise ForeignValueError(name)
        return stored

    async def _step(self, script: Script, key: str, *arguments: str | bytes | int) -> bool:
        return bool(await self._run(script, [self._record_key(key)], arguments, self._record_timeout))

    # -- the wire

    async def _run(self, script: Script, keys: list[str], arguments: Arguments, timeout: float) -> Any:  # noqa: ASYNC109
        until = monotonic() + timeout
        rest = (len(keys), *keys, *arguments)
        reply = await self._nodes.send(keys[0], ("EVALSHA", script.digest, *rest), timeout)
        if isinstance(reply, hiredis.ReplyError):
            if str(reply).startswith("NOSCRIPT"):
                return await self._call(keys[0], ("EVAL", script.source, *rest), until - monotonic())
            fail(reply, keys[0])
        return reply

    async def _call(self, key: str, arguments: Arguments, timeout: float) -> Any:  # noqa: ASYNC109
        reply = await self._nodes.send(key, arguments, timeout)
        if isinstance(reply, hiredis.ReplyError):
            fail(reply, key)
        return reply


def fail(error: Exception, key: str) -> NoReturn:
    """Raise what an error reply about ``key`` means."""
    if not isinstance(error, hiredis.ReplyError):
        raise error
    code = code_of(error)
    if code in ("FOREIGN", "WRONGTYPE"):
        raise ForeignValueError(key)
    raise StoreUnavailableError(f"The store refused a command: {code}.")


def _token(token: str) -> bytes:
    return blake2b(token.encode(), digest_size=16).digest()


def _standing(stored: record.Stored, left: float) -> Standing:
    # On a clock that began when the record was written, since its age is all that is known.
    lease, ttl = (0.0, stored.span) if stored.done else (stored.span, stored.life)
    told = Record("", stored.epoch, stored.fingerprint, lease, stored.done, stored.reply, ttl_until=ttl)
    told.released = stored.released
    return stand(told, gone_at=stored.life, now=stored.life - left)


def _answer(kind: bytes, rest: list[Any], lease: float) -> Claim:
    match kind:
        case b"claimed":
            return Claimed(rest[0])
        case b"in_progress":
            return InProgress(min(rest[0] / 1000, lease, LONGEST_HINT))
        case b"mismatched":
            return Mismatched()
        case b"expired":
            return Expired()
        case _:
            return Abandoned()
