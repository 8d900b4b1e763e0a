"""Floor 1: one store for every process. Scripts decide on the server, by its clock; this carries the words."""

import re
from collections.abc import Awaitable, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from time import monotonic
from typing import Any

import hiredis
from redis.asyncio import Redis, RedisCluster

from resilience.decisions.quota import Usage
from resilience.errors import ConfigurationError, ForeignValueError
from resilience.stores.base import Want
from resilience.stores.cluster import ClusterNodes
from resilience.stores.hot_keys import Denials, Group, Merger, answered_now, key_of
from resilience.stores.link import Arguments
from resilience.stores.nodes import Nodes, Script, SingleNode
from resilience.stores.redis_records import RedisRecords, fail
from resilience.stores.rule_arguments import LETTERS, holder, rule_arguments
from resilience.stores.scattered import acquire_scattered, subjects_of
from resilience.stores.sealing import Sealing

_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_GROUPS = 16  # Groups of rules in one script: the server works on one part while the next is on its way.


class RedisStore(RedisRecords):
    """Counts and records in Redis 6.2 or newer, or Valkey: one for all processes and hosts that share it.

    Args:
        source: a URL (``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://``), or an application's own
            ``redis.asyncio`` client: a ``Redis``, one that ``Sentinel.master_for`` made included, or a
            ``RedisCluster``. Its connection options are used; its connections are not.
        prefix: what every key starts with: letters, digits, ``.``, ``_``, ``-``, at most 64 of them.
        limit_timeout: seconds that a rate limit may take.
        record_timeout: seconds that an idempotency step may take.
        compress: whether kept replies of more than 1 KiB are compressed.
        encryption: keys of 32 random bytes by id, which kept replies are encrypted with: the first encrypts, all
            decrypt. A key is good for 2**32 replies, its id for no other key. Needs the extra ``encryption``.
        refuse_unsealed: whether a reply that is not encrypted counts as not replayable; for when the last one that was
            kept before there were keys is gone.

    Raises:
        ConfigurationError: the URL, the prefix or a key is malformed, or a package is missing; never shows the URL or
            a key.
    """

    def __init__(
        self,
        source: "str | Redis | RedisCluster",
        *,
        prefix: str = "resilience",
        limit_timeout: float = 0.05,
        record_timeout: float = 0.25,
        compress: bool = False,
        encryption: Mapping[str, bytes] | None = None,
        refuse_unsealed: bool = False,
    ) -> None:
        if not _PREFIX.fullmatch(prefix):
            raise ConfigurationError("A prefix is 1 to 64 letters, digits, '.', '_' and '-'.")
        sealing = Sealing(compress=compress, keys=encryption, refuse_unsealed=refuse_unsealed)
        super().__init__(f"{prefix}:v1", record_timeout, sealing)
        self._limit_timeout = limit_timeout
        self._acquire = Script("acquire")
        scripts = [self._acquire, *self._scripts]
        client = _client(source)
        self._nodes: Nodes = (
            ClusterNodes(client, scripts) if isinstance(client, RedisCluster) else SingleNode(client, scripts)
        )
        self._merger = Merger(self._ask, monotonic, most=1 if self._nodes.clustered else _MOST_GROUPS)
        self._denials = Denials(monotonic)

    # -- rate limits

    def acquire(self, wants: Sequence[Want]) -> Awaitable[Sequence[Usage]]:
        """Take all that is wanted or nothing of it. See ``RateLimitStore``."""
        # No coroutine of its own: on a hot key that would be a tenth of what a call costs.
        key = key_of(wants)
        if self._denials.known and (known := self._denials.find(key)) is not None:
            return answered_now(known)
        if self._nodes.clustered and len(wants) > 1:
            parts = subjects_of(wants)
            if len(parts) > 1:
                return acquire_scattered(wants, parts, self.acquire)
        return self._merger.acquire(key, wants) if wants else answered_now([])

    async def free(self, wants: Sequence[Want]) -> None:
        """Give permits of ``concurrency`` quotas back. See ``RateLimitStore``."""
        for want in wants:
            if want.quota.algorithm == "concurrency":
                key = self._count_key(want.rule, want.subject, "C")
                await self._call(key, ("ZREM", key, holder(want)), self._limit_timeout)

    async def reset(self, rule: str, subject: str) -> None:
        """Forget what one subject used of one rule."""
        keys = [self._count_key(rule, subject, letter) for letter in sorted(set(LETTERS.values()))]
        await self._call(keys[0], ("DEL", *keys), self._limit_timeout)
        # Replies come in order, so whatever was denied before the reset is known by now.
        self._denials.forget(rule, subject)

    def _ask(self, groups: list[Group]) -> None:
        keys: list[str] = []
        arguments: list[str | int] = []
        for group in groups:
            arguments += (len(group.futures), len(group.wants))
            for want in group.wants:
                keys.append(self._count_key(want.rule, want.subject, LETTERS[want.quota.algorithm]))
                arguments += rule_arguments(want)
        rest = (len(keys), *keys, *arguments)
        self._ask_for(groups, keys[0], ("EVALSHA", self._acquire.digest, *rest))

    def _ask_for(self, groups: list[Group], key: str, command: Arguments) -> None:
        left = self._limit_timeout - (monotonic() - groups[0].asked_at)
        self._nodes.tell(key, command, left, partial(self._answer, groups, key, command))

    def _answer(self, groups: list[Group], key: str, command: Arguments, reply: Any) -> None:
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
            self._ask_for(groups, key, ("EVAL", self._acquire.source, *command[2:]))
            return
        self._merger.answered()
        try:
            if isinstance(reply, Exception):
                fail(reply, key)
            self._share(groups, reply)
        except Exception as error:  # whatever it is, nobody is left waiting
            for group in groups:
                group.fail(error)

    def _share(self, groups: list[Group], reply: list[Any]) -> None:
        at = 1
        for group in groups:
            following = at + 1 + 3 * len(group.wants)
            if reply[at] < 0:
                want = group.wants[-reply[at] - 1]
                key = self._count_key(want.rule, want.subject, LETTERS[want.quota.algorithm])
                group.fail(ForeignValueError(key))
                at = following
                continue
            denied = group.answer(reply[at], reply[at + 1 : following])
            if denied is not None and not group.fickle:
                self._denials.note(group.key, group.asked_at, denied)
            at = following

    def _count_key(self, rule: str, subject: str, letter: str) -> str:
        # The subject in braces: in a cluster all rules of one subject are in one slot.
        return f"{self._prefix}:{{{_digest(subject, 12)}}}:{letter}{_digest(rule, 8)}"

    async def aclose(self) -> None:
        """Close every connection. Later calls are refused."""
        await self._nodes.aclose()


@lru_cache(maxsize=10_000)
def _digest(text: str, size: int) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def _client(source: "str | Redis | RedisCluster") -> "Redis | RedisCluster":
    if not isinstance(source, str):
        return source
    try:
        scheme, separator, rest = source.partition("+cluster://")
        if separator:
            return RedisCluster.from_url(f"{scheme}://{rest}", protocol=2)
        return Redis.from_url(source, protocol=2)
    except ValueError:
        # The text of redis-py's error may quote the password.
        raise ConfigurationError(
            "The Redis URL is malformed. Write redis://[user:password@]host[:port][/db], with rediss:// for TLS, "
            "redis+cluster:// for a cluster or unix:///path; percent-encode a password's special characters."
        ) from None
