"""Floor 1: a Redis Cluster: a link to each primary, and the map of slots that redis-py discovers."""

import asyncio
import logging
from typing import Any

import hiredis
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from resilience.errors import StoreUnavailableError
from resilience.stores.link import Arguments, Link
from resilience.stores.nodes import Script, Server

logger = logging.getLogger("resilience")

_MOST_HOPS = 4
_DISCOVERY_TIMEOUT = (
    5.0  # Seconds; in the background, so nobody waits for it but the first callers, up to their deadline.
)
_PAUSE = 0.2  # Seconds between two discoveries.


class ClusterNodes:
    """Sends each command to the primary of its slot, follows redirections, and learns of changes.

    Args:
        client: knows the cluster's addresses and how to connect; its connections are not used.
        scripts: handed to each node.
    """

    clustered = True

    def __init__(self, client: RedisCluster, scripts: list[Script]) -> None:
        self._client = client
        self._scripts = scripts
        self._links: dict[str, Link] = {}
        self._servers: dict[str, Server] = {}
        self._slots: dict[int, str] = {}
        self._discovering: asyncio.Task[None] | None = None
        self._why = ""
        self._closed = False

    @property
    def native_claim(self) -> bool:
        """Whether every node that was talked to has ``SET NX GET``."""
        return bool(self._servers) and all(server.native_claim for server in self._servers.values())

    async def send(self, key: str, arguments: Arguments, timeout: float) -> Any:  # noqa: ASYNC109 - swept by the links
        """Send a command to the server that ``key`` is on. See ``Link.send``."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        if not self._slots:
            await self._first_discovery(timeout)
        address = self._slots.get(key_slot(key.encode()))
        if address is None:
            self._discover()
            raise StoreUnavailableError("No node of the cluster has the slot of a key.")
        return await self._follow(address, arguments, until)

    async def _follow(self, address: str, arguments: Arguments, until: float) -> Any:
        loop = asyncio.get_running_loop()
        asking = False
        for _ in range(_MOST_HOPS):
            left = until - loop.time()
            if left <= 0:
                break
            link = self._link(address)
            if asking:
                link.send(("ASKING",), left).add_done_callback(_seen)
            try:
                reply = await link.send(arguments, left)
            except StoreUnavailableError:
                self._discover()  # its slots may have found another owner
                raise
            code, *rest = str(reply).split(" ") if isinstance(reply, hiredis.ReplyError) else ("",)
            if code not in ("MOVED", "ASK") or len(rest) != 2:
                if code in ("CLUSTERDOWN", "READONLY"):
                    self._discover()
                return reply
            asking, address = code == "ASK", rest[1]
            if not asking:
                self._slots[int(rest[0])] = address
                self._discover()
        raise StoreUnavailableError("The cluster kept redirecting a command until its deadline.")

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
        if self._closed:
            raise StoreUnavailableError("The store was closed.")
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
            async with asyncio.timeout(_DISCOVERY_TIMEOUT):
                await self._client.nodes_manager.initialize()
            slots = self._client.nodes_manager.slots_cache
            self._slots = {slot: f"{nodes[0].host}:{nodes[0].port}" for slot, nodes in slots.items()}
            await self._drop({f"{nodes[0].host}:{nodes[0].port}" for nodes in slots.values()})
            if self._why:
                logger.warning("The Redis Cluster is available again")
            self._why = ""
        except Exception as error:  # what redis-py raises has no common base
            if not self._why:
                logger.warning("The Redis Cluster can't be discovered: %s", type(error).__name__)
            self._why = type(error).__name__
        finally:
            asyncio.get_running_loop().call_later(_PAUSE, self._discovered_once)

    def _discovered_once(self) -> None:
        self._discovering = None

    async def _drop(self, primaries: set[str]) -> None:
        for address in self._links.keys() - primaries:
            del self._servers[address]
            await self._links.pop(address).aclose()

    async def aclose(self) -> None:
        """Close every link."""
        self._closed = True
        if self._discovering is not None:
            self._discovering.cancel()
            await asyncio.wait({self._discovering})
        await self._drop(set())
        await self._client.aclose()


def _seen(done: "asyncio.Future[Any]") -> None:
    if not done.cancelled():
        done.exception()  # the command that follows tells
