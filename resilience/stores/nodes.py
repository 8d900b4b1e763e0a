"""Floor 1: which node a key is on, and what its error replies mean.

redis-py knows addresses, sentinels and the cluster's slots; this asks it, and keeps one link to each node.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable
from hashlib import sha1
from importlib.resources import files
from typing import Any, Protocol

import hiredis
from redis.asyncio import Redis

from resilience.errors import StoreUnavailableError
from resilience.stores.link import Arguments, Link, Send
from resilience.stores.multiplexed import Answered

logger = logging.getLogger("resilience")

_OLDEST = (6, 2)
_NATIVE_CLAIM = (7, 0)


class Script:
    """A Lua script: called by its digest, sent whole where the server has forgotten it."""

    __slots__ = ("digest", "source")

    def __init__(self, name: str) -> None:
        self.source = files("resilience.stores.lua").joinpath(f"{name}.lua").read_bytes()
        self.digest = sha1(self.source).hexdigest()  # noqa: S324 - the name that Redis gives it, not a secret


class Nodes(Protocol):
    """One server, or a cluster."""

    clustered: bool
    """Whether keys of different subjects may be on different servers."""

    @property
    def native_claim(self) -> bool:
        """Whether the servers have ``SET NX GET``; learnt when a connection opens."""
        ...

    def send(self, key: str, arguments: Arguments, timeout: float) -> Awaitable[Any]:
        """Send a command to the server that ``key`` is on. See ``Link.send``."""
        ...

    def tell(self, key: str, arguments: Arguments, timeout: float, answered: Answered) -> None:
        """Send a command to the server that ``key`` is on, and tell the reply. See ``Link.tell``."""
        ...

    async def aclose(self) -> None:
        """Close every link."""
        ...


class Server:
    """What is learnt from a server when a connection to it opens: is it fit, and what can it do."""

    def __init__(self, name: str, scripts: list[Script]) -> None:
        self.name = name
        self.native_claim = False
        self._scripts = scripts
        self._warned: set[str] = set()

    async def setup(self, send: Send) -> None:
        """Check the server and hand it the scripts.

        Raises:
            StoreUnavailableError: it is too old, or a replica.
        """
        info = await send(("INFO",))
        if isinstance(info, hiredis.ReplyError):
            self._warn(f"it does not let us ask INFO ({code_of(info)}), so it is used unchecked")
        else:
            self._check(dict(_INFO_LINE.findall(info.decode())))
        for script in self._scripts:
            reply = await send(("SCRIPT", "LOAD", script.source))
            if isinstance(reply, hiredis.ReplyError):
                raise StoreUnavailableError(f"it refuses scripts ({code_of(reply)})")

    def _check(self, info: dict[str, str]) -> None:
        version = tuple(int(part) for part in re.findall(r"\d+", info.get("redis_version", "0"))[:2])
        if version < _OLDEST:
            raise StoreUnavailableError(f"it is version {info.get('redis_version')}; 6.2 is the oldest that works")
        if info.get("role") == "slave":
            raise StoreUnavailableError("it is a replica, and a count or claim needs the primary")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            self._warn(f"its maxmemory-policy is {policy}: it may drop counts and idempotency records. Use noeviction")
        self.native_claim = version >= _NATIVE_CLAIM

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s: %s", self.name, text)


_INFO_LINE = re.compile(r"^(redis_version|role|maxmemory_policy):(\S+)", re.MULTILINE)


class SingleNode:
    """A standalone server, or whatever primary the sentinels name when a connection opens."""

    clustered = False

    def __init__(self, client: Redis, scripts: list[Script]) -> None:
        pool = client.connection_pool
        self._server = Server(_name(pool.connection_kwargs), scripts)
        self._link = Link(pool.make_connection, self._server.setup, self._server.name)

    @property
    def native_claim(self) -> bool:
        """Whether the server has ``SET NX GET``."""
        return self._server.native_claim

    def send(self, _key: str, arguments: Arguments, timeout: float) -> Awaitable[Any]:
        """Send a command to the one server; where it is the primary no more, look for the new one."""
        return self._looked_at(self._link.send(arguments, timeout))

    def tell(self, _key: str, arguments: Arguments, timeout: float, answered: Answered) -> None:
        """Send a command and tell its reply; where the server is the primary no more, look for the new one."""

        def seen(reply: Any) -> None:
            self._look_at(reply)
            answered(reply)

        self._link.tell(arguments, timeout, seen)

    async def _looked_at(self, sent: "asyncio.Future[Any]") -> Any:
        # Not by a callback of the future's, which would take a turn of the loop for each command.
        reply = await sent
        self._look_at(reply)
        return reply

    def _look_at(self, reply: Any) -> None:
        if isinstance(reply, hiredis.ReplyError):
            code = code_of(reply)
            if code in ("READONLY", "MASTERDOWN"):
                self._link.reset("it is no longer the primary")
            elif code == "MOVED":
                self._link.reset("it is a node of a cluster; pass a RedisCluster, or redis+cluster://")

    async def aclose(self) -> None:
        """Close the link."""
        await self._link.aclose()


def _name(options: dict[str, Any]) -> str:
    if "path" in options:
        return f"Redis at {options['path']}"
    if "host" in options:
        return f"Redis at {options['host']}:{options.get('port', 6379)}"
    return "Redis behind sentinels"


# What Redis 6.2 makes of an error that a command of a script meets.
_IN_SCRIPT = re.compile(r"ERR Error running script \(call to \w+\): (?:@user_script: ?\d+: )+-?([A-Z]+) ")


def code_of(error: hiredis.ReplyError) -> str:
    """Return an error reply's code, of the command that failed where that was inside a script."""
    text = str(error)
    inside = _IN_SCRIPT.match(text)
    return inside[1] if inside else text.partition(" ")[0]
