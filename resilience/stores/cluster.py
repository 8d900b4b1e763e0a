"""Floor 1: a Redis Cluster: a link to each primary, and the map of slots that its nodes tell."""

import asyncio
import logging
import random
from functools import partial
from typing import Any

import hiredis
from redis.asyncio import RedisCluster
from redis.crc import key_slot
from redis.exceptions import ResponseError

from resilience.errors import StoreUnavailableError
from resilience.stores.connect import opened, reason_of
from resilience.stores.link import Arguments, Link
from resilience.stores.multiplexed import Answered, tell_result
from resilience.stores.nodes import Script, Server

logger = logging.getLogger("resilience")

_MOST_HOPS = 4
_TELL_TIMEOUT = 1.0  # Seconds that a node may take to tell the map; only the first callers wait for it.
_PAUSE = 0.2  # Seconds between two discoveries.
_TRY_AGAIN = 0.005  # Seconds; while a slot moves, some keys of a command may be here and others there.


class ClusterNodes:
    """Sends each command to the primary of its slot, follows redirections, and learns of changes.

    Args:
        client: knows first addresses and how to connect; its connections are neither used nor closed.
        scripts: handed to each node.
    """

    clustered = True

    def __init__(self, client: RedisCluster, scripts: list[Script]) -> None:
        self._client = client
        self._scripts = scripts
        self._links: dict[str, Link] = {}
        self._servers: dict[str, Server] = {}
        self._slots: dict[int, str] = {}
        self._addresses = {f"{node.host}:{node.port}" for node in client.nodes_manager.startup_nodes.values()}
        self._discovering: asyncio.Task[None] | None = None
        self._why = ""
        self._closed = False
        self._sending: set[asyncio.Task[Any]] = set()

    @property
    def native_claim(self) -> bool:
        """Whether every node that was talked to has ``SET NX GET``."""
        return bool(self._servers) and all(server.native_claim for server in self._servers.values())

    async def send(self, key: str, arguments: Arguments, timeout: float) -> Any:  # noqa: ASYNC109 - swept by the links
        """Send a command to the server that ``key`` is on. See ``Link.send``."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        if self._closed:
            raise StoreUnavailableError("The store was closed.")
        if not self._slots:
            await self._first_discovery(timeout)
        address = self._slots.get(key_slot(key.encode()))
        if address is None:
            self._discover()
            raise StoreUnavailableError("No node of the cluster has the slot of a key.")
        return await self._follow(address, arguments, until)

    def tell(self, key: str, arguments: Arguments, timeout: float, answered: Answered) -> None:
        """Send a command to the server that ``key`` is on, and tell the reply. See ``Link.tell``."""
        sending = asyncio.get_running_loop().create_task(self.send(key, arguments, timeout))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        sending.add_done_callback(partial(tell_result, answered))

    async def _follow(self, address: str, arguments: Arguments, until: float) -> Any:
        loop = asyncio.get_running_loop()
        asking, hops = False, 0
        while hops < _MOST_HOPS and (left := until - loop.time()) > 0:
            link = self._link(address)
            if asking:
                link.send(("ASKING",), left).add_done_callback(_seen)
            try:
                reply = await link.send(arguments, left)
            except StoreUnavailableError:
                self._discover()  # its slots may have found another owner
                raise
            code, *rest = str(reply).split(" ") if isinstance(reply, hiredis.ReplyError) else ("",)
            if code == "TRYAGAIN":
                await asyncio.sleep(_TRY_AGAIN)
                continue
            if code not in ("MOVED", "ASK") or len(rest) != 2:
                if code in ("CLUSTERDOWN", "READONLY"):
                    self._discover()
                return reply
            asking, address, hops = code == "ASK", rest[1], hops + 1
            if not asking:
                self._slots[int(rest[0])] = address
                self._discover()
        raise StoreUnavailableError("The cluster kept moving the keys of a command until its deadline.")

    def _link(self, address: str) -> Link:
        link = self._links.get(address)
        if link is None:
            host, _, port = address.rpartition(":")
            server = self._servers[address] = Server(f"Redis Cluster node {address}", self._scripts)
            link = self._links[address] = Link(lambda: self._make(host, int(port)), server.setup, server.name)
        return link

    def _make(self, host: str, port: int) -> Any:
        manager = self._client.nodes_manager
        known = manager.get_node(host=host, port=port) or next(iter(manager.startup_nodes.values()))
        options = {**known.connection_kwargs, "host": host, "port": port}
        return known.connection_class(**options)

    async def _first_discovery(self, patience: float) -> None:
        if self._why:
            self._discover()
            raise StoreUnavailableError(f"The cluster is not available: {self._why}.")
        self._discover()
        if self._discovering is not None:
            await asyncio.wait({self._discovering}, timeout=patience)
        if not self._slots:
            raise StoreUnavailableError(f"The cluster is not available: {self._why or 'it has not answered yet'}.")

    def _discover(self) -> None:
        if self._discovering is None and not self._closed:
            self._discovering = asyncio.get_running_loop().create_task(self._discovered())

    async def _discovered(self) -> None:
        try:
            why = await self._learn()
        finally:
            asyncio.get_running_loop().call_later(_PAUSE, self._discovered_once)
        if why and not self._why:
            logger.warning("The Redis Cluster can't be discovered: %s", why)
        elif self._why and not why:
            logger.warning("The Redis Cluster is available again")
        self._why = why

    def _discovered_once(self) -> None:
        self._discovering = None

    async def _learn(self) -> str:
        """Learn the map from the first node that tells it; return what went wrong, or nothing."""
        why = "it has no nodes"
        for address in random.sample(
            sorted(self._addresses), len(self._addresses)
        ):  # one that hangs is not always first
            try:
                async with asyncio.timeout(_TELL_TIMEOUT):
                    told = await self._ask(address)
            except Exception as error:  # what redis-py raises has no common base
                why = str(error) if type(error) is ResponseError else reason_of(error)
                continue
            if not told:
                why = "none of its slots has a node"
                continue
            self._slots = {slot: nodes[0] for first, last, nodes in told for slot in range(first, last + 1)}
            self._addresses.update(node for _, _, nodes in told for node in nodes)
            await self._drop({nodes[0] for _, _, nodes in told})
            return ""
        return why

    async def _ask(self, address: str) -> list[tuple[int, int, list[str]]]:
        """Return ranges of slots and the nodes that have them, the primary first, as one node sees it."""
        host, _, port = address.rpartition(":")
        connection = await opened(self._make(host, int(port)))
        try:
            await connection.send_command("CLUSTER SLOTS")
            ranges = await connection.read_response()
        finally:
            await connection.disconnect(nowait=True)
        return [(first, last, [self._address(host, *node[:2]) for node in nodes]) for first, last, *nodes in ranges]

    def _address(self, asked: str, host: bytes | str | None, port: int) -> str:
        name = host.decode() if isinstance(host, bytes) else host
        # A node that does not know its own name leaves it out, and is where it was asked.
        here, there = self._client.nodes_manager.remap_host_port(asked if name in (None, "", "?") else name, port)
        return f"{here}:{there}"

    async def _drop(self, primaries: set[str]) -> None:
        for address in self._links.keys() - primaries:
            if not (primaries and self._links[address].busy):  # slots may be on their way to it
                del self._servers[address]
                await self._links.pop(address).aclose()

    async def aclose(self) -> None:
        """Close every link."""
        self._closed = True
        if self._discovering is not None:
            self._discovering.cancel()
            await asyncio.wait({self._discovering})
        await self._drop(set())
        if self._sending:
            await asyncio.wait(self._sending)


def _seen(done: "asyncio.Future[Any]") -> None:
    if not done.cancelled():
        done.exception()  # the command that follows tells
