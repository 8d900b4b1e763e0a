"""The link against a real server of sockets, which says what a test tells it to, when it is told to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import hiredis
import pytest
from redis.asyncio import Connection

from resilience.errors import StoreUnavailableError
from resilience.stores.link import Link, Send

LONG = 5.0
SHORT = 0.15


class Peer:
    """Speaks the Redis protocol, one command at a time as a test asks for it."""

    def __init__(self) -> None:
        self.commands: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.opened = 0
        self.came = asyncio.Event()
        self.port = 0
        self.greets = True
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Take no more connections and drop those that there are."""
        assert self._server is not None
        self._server.close()
        self.drop()
        await self._server.wait_closed()

    def drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def next(self, count: int = 1) -> list[list[bytes]]:
        """Return the next commands that arrive."""
        async with asyncio.timeout(LONG):
            return [await self.commands.get() for _ in range(count)]

    def say(self, data: bytes) -> None:
        self._writers[-1].write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        self.came.set()
        self._writers.append(writer)
        parser = hiredis.Reader()
        try:
            while data := await reader.read(2**16):
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    if command[0] in (b"CLIENT", b"HELLO", b"SELECT"):  # redis-py says who it is
                        if self.greets:
                            writer.write(b"+OK\r\n")
                    else:
                        self.commands.put_nowait(command)
        except ConnectionError:
            pass
        finally:
            writer.close()


async def no_setup(_send: Send) -> None:
    return


def make_link(peer: Peer, setup: Callable[[Send], Any] = no_setup, **options: Any) -> Link:
    return Link(lambda: Connection(host="127.0.0.1", port=peer.port, protocol=2), setup, "The peer", **options)


@asynccontextmanager
async def linked(*, answering: bool = True, **options: Any) -> AsyncIterator[tuple[Peer, Link]]:
    async with Peer() as peer:
        link = make_link(peer, **options)
        try:
            if answering:
                await open_again(peer, link)
            yield peer, link
        finally:
            await link.aclose()


async def open_again(peer: Peer, link: Link) -> None:
    """Wait until the link is open, and has said so by an answer."""
    async with asyncio.timeout(LONG):
        while True:
            sent = link.send(("OPEN",), LONG)
            try:
                done, _ = await asyncio.wait({sent, getting := asyncio.ensure_future(peer.commands.get())},
                                             return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
                if getting in done:
                    peer.say(b"+OPEN\r\n")
                    assert await sent == b"OPEN"
                    return
                getting.cancel()
                await sent
            except StoreUnavailableError:
                await asyncio.sleep(0.01)


async def failed(future: "asyncio.Future[Any]") -> float:
    """Wait until it fails as a store does that is not there; return the seconds that took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(future, 2 * LONG)
    return loop.time() - started


async def test_replies_of_every_kind_go_to_their_commands_in_order() -> None:
    async with linked() as (peer, link):
        sent = [link.send(("C", n), LONG) for n in range(6)]
        assert await peer.next(6) == [[b"C", str(n).encode()] for n in range(6)]
        peer.say(b"+OK\r\n:7\r\n$-1\r\n$4\r\n\xff\0\r\n\r\n*2\r\n:1\r\n*0\r\n$0\r\n\r\n")
        assert await asyncio.gather(*sent) == [b"OK", 7, None, b"\xff\0\r\n", [1, []], b""]


async def test_replies_that_come_in_pieces_are_put_together() -> None:
    async with linked() as (peer, link):
        sent = [link.send(("C",), LONG), link.send(("C",), LONG)]
        await peer.next(2)
        for byte in b"$6\r\nab\r\ncd\r\n:42\r\n":
            peer.say(bytes([byte]))
            await asyncio.sleep(0.001)
        assert await asyncio.gather(*sent) == [b"ab\r\ncd", 42]


async def test_commands_of_one_turn_leave_in_one_write() -> None:
    async with linked() as (peer, link):
        assert link._wire is not None
        transport, writes = link._wire._transport, []

        class Counting:
            def write(self, data: bytes) -> None:
                writes.append(data)
                transport.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

        link._wire._transport = Counting()
        first = link.send(("FIRST",), LONG)
        await peer.next()
        assert len(writes) == 1
        sent = [link.send(("C", n), LONG) for n in range(50)]
        assert await peer.next(50) == [[b"C", str(n).encode()] for n in range(50)]
        assert len(writes) == 2
        peer.say(b"+OK\r\n" * 51)
        await asyncio.gather(first, *sent)


async def test_arguments_arrive_as_they_are() -> None:
    async with linked() as (peer, link):
        sent = link.send((b"\0\r\n\xff", "é", 12, ""), LONG)
        assert await peer.next() == [[b"\0\r\n\xff", "é".encode(), b"12", b""]]
        peer.say(b"+OK\r\n")
        await sent


async def test_a_command_past_its_deadline_fails_alone_while_others_are_answered() -> None:
    async with linked() as (peer, link):
        first, late, last = (link.send((name,), timeout) for name, timeout in (("A", LONG), ("B", 0.3), ("C", LONG)))
        await peer.next(3)
        await asyncio.sleep(0.1)
        peer.say(b"+A\r\n")
        assert await first == b"A"
        await failed(late)
        peer.say(b"+B\r\n+C\r\n")
        assert await last == b"C"  # and not the reply that came too late
        assert peer.opened == 1


@pytest.mark.parametrize("behind", [0.5, LONG, 10 * LONG])
async def test_a_deadline_is_kept_behind_a_longer_one(behind: float) -> None:
    async with linked() as (peer, link):
        patient = link.send(("A",), behind)
        hasty = link.send(("B",), SHORT)
        await peer.next(2)
        assert await failed(hasty) < 2 * SHORT
        patient.cancel()


async def test_silence_fails_all_that_wait_and_the_link_opens_anew() -> None:
    async with linked() as (peer, link):
        hasty, patient = link.send(("A",), SHORT), link.send(("B",), LONG)
        await peer.next(2)
        assert await failed(hasty) < LONG / 2
        await asyncio.sleep(0)
        assert patient.done()
        await failed(patient)
        await open_again(peer, link)
        assert peer.opened == 2


async def test_an_idle_connection_is_not_a_silent_one() -> None:
    async with linked() as (peer, link):
        await asyncio.sleep(3 * SHORT)
        sent = link.send(("A",), 2 * SHORT)
        await peer.next()
        await asyncio.sleep(SHORT)
        peer.say(b"+A\r\n")
        assert await sent == b"A"
        assert peer.opened == 1


async def test_no_more_than_the_bound_are_in_flight_and_the_next_is_refused_at_once() -> None:
    async with linked(max_in_flight=3) as (peer, link):
        sent = [link.send(("C",), LONG) for _ in range(3)]
        assert await failed(link.send(("OVER",), LONG)) < LONG / 2
        assert await peer.next(3) == [[b"C"]] * 3
        peer.say(b"+OK\r\n")
        await sent[0]
        again = link.send(("AGAIN",), LONG)
        assert await peer.next() == [[b"AGAIN"]]
        peer.say(b"+OK\r\n" * 3)
        assert await again == b"OK"


async def test_the_bound_holds_while_the_connection_opens() -> None:
    async with linked(answering=False, max_in_flight=3) as (peer, link):
        sent = [link.send(("C", n), LONG) for n in range(5)]
        assert await peer.next(3) == [[b"C", b"0"], [b"C", b"1"], [b"C", b"2"]]
        for over in sent[3:]:
            assert await failed(over) < LONG / 2
        peer.say(b"+OK\r\n" * 3)
        assert await asyncio.gather(*sent[:3]) == [b"OK"] * 3


async def test_a_command_that_nobody_waits_for_counts_until_it_is_answered() -> None:
    async with linked(max_in_flight=2) as (peer, link):
        sent = [link.send(("C",), LONG) for _ in range(2)]
        sent[0].cancel()
        await failed(link.send(("OVER",), LONG))
        await peer.next(2)
        peer.say(b"+OK\r\n+OK\r\n")
        assert await sent[1] == b"OK"


async def test_an_error_reply_is_a_value_and_the_connection_goes_on() -> None:
    async with linked() as (peer, link):
        wrong, right = link.send(("A",), LONG), link.send(("B",), LONG)
        await peer.next(2)
        peer.say(b"-ERR it is wrong\r\n+OK\r\n")
        error = await wrong
        assert isinstance(error, hiredis.ReplyError)
        assert str(error) == "ERR it is wrong"
        assert await right == b"OK"
        assert peer.opened == 1


async def test_a_cancelled_waiter_shifts_no_reply() -> None:
    async with linked() as (peer, link):
        sent = [link.send(("C", n), LONG) for n in range(3)]
        sent[1].cancel()
        assert await peer.next(3) == [[b"C", b"0"], [b"C", b"1"], [b"C", b"2"]]
        peer.say(b":0\r\n:1\r\n:2\r\n")
        assert [await sent[0], await sent[2]] == [0, 2]


async def test_what_waits_fails_as_soon_as_the_connection_is_lost() -> None:
    async with linked() as (peer, link):
        sent = [link.send(("C",), LONG) for _ in range(3)]
        await peer.next(3)
        peer.drop()
        for future in sent:
            assert await failed(future) < LONG / 2


async def test_while_the_server_is_gone_commands_fail_at_once_and_once_it_is_back_they_pass() -> None:
    async with linked() as (peer, link):
        waits = link.send(("A",), LONG)
        await peer.next()
        await peer.stop()
        await failed(waits)
        for _ in range(100):
            assert await failed(link.send(("B",), LONG)) < LONG / 2
        await peer.listen()
        await open_again(peer, link)
        assert peer.commands.empty()  # nothing that failed is sent later


async def test_a_server_that_was_never_there_fails_commands_and_is_found_once_it_is() -> None:
    peer = Peer()
    await peer.listen()
    await peer.stop()
    link = make_link(peer)
    assert await failed(link.send(("A",), LONG)) < LONG / 2
    await peer.listen()
    await open_again(peer, link)
    await link.aclose()
    await peer.stop()


async def test_commands_that_come_before_the_connection_is_open_go_in_order() -> None:
    async with linked(answering=False) as (peer, link):
        sent = [link.send(("C", n), LONG) for n in range(5)]
        assert await peer.next(5) == [[b"C", str(n).encode()] for n in range(5)]
        peer.say(b"".join(b":%d\r\n" % n for n in range(5)))
        assert await asyncio.gather(*sent) == list(range(5))
        assert peer.opened == 1


async def test_a_server_that_takes_connections_and_says_nothing_costs_a_command_its_deadline() -> None:
    async with linked(answering=False) as (peer, link):
        peer.greets = False
        assert await failed(link.send(("A",), SHORT)) < 0.9
        assert peer.commands.empty()


async def test_what_a_link_asks_when_it_opens_comes_first_on_each_connection() -> None:
    asked = []

    async def setup(send: Send) -> None:
        asked.append(await send(("WHO",)))

    async with linked(answering=False, setup=setup) as (peer, link):
        for connection in (1, 2):
            sent = link.send(("A",), LONG)
            if connection == 2:
                await failed(sent)
            assert await peer.next() == [[b"WHO"]]
            peer.say(b"+ME\r\n")
            if connection == 1:
                assert await peer.next() == [[b"A"]]
                peer.drop()
                await failed(sent)
        await open_again(peer, link)
        assert asked == [b"ME", b"ME"]


async def test_what_the_setup_raises_keeps_the_link_shut_and_is_told() -> None:
    async def setup(send: Send) -> None:
        if await send(("WHO",)) == b"WRONG":
            raise StoreUnavailableError("it is the wrong one")

    async with linked(answering=False, setup=setup) as (peer, link):
        sent = link.send(("A",), LONG)
        await peer.next()
        peer.say(b"+WRONG\r\n")
        with pytest.raises(StoreUnavailableError, match="it is the wrong one"):
            await sent
        with pytest.raises(StoreUnavailableError, match="it is the wrong one"):
            await link.send(("A",), LONG)
        assert await peer.next() == [[b"WHO"]]
        peer.say(b"+RIGHT\r\n")
        await open_again(peer, link)


async def test_a_connection_that_is_lost_right_after_its_setup_is_not_taken_for_open() -> None:
    async def setup(send: Send) -> None:
        await send(("WHO",))

    async with linked(answering=False, setup=setup) as (peer, link):
        sent = link.send(("A",), LONG)
        await peer.next()
        writer = peer._writers[-1]
        writer.write(b"+ME\r\n")
        writer.close()
        assert await failed(sent) < LONG / 2
        assert await peer.next() == [[b"WHO"]]
        peer.say(b"+ME\r\n")
        await open_again(peer, link)


@pytest.mark.parametrize("nonsense", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n+TOO\r\n+MANY\r\n"])
async def test_a_server_that_does_not_speak_the_protocol_fails_what_waits(nonsense: bytes) -> None:
    async with linked() as (peer, link):
        sent = link.send(("A",), LONG)
        await peer.next()
        peer.say(nonsense)
        if nonsense.startswith(b"+OK"):
            assert await sent == b"OK"
        else:
            assert await failed(sent) < LONG / 2
        await open_again(peer, link)
        assert peer.opened == 2


async def test_a_closed_link_refuses_and_opens_no_connection() -> None:
    async with linked() as (peer, link):
        await link.aclose()
        assert await failed(link.send(("A",), LONG)) < LONG / 2
        assert peer.opened == 1
        assert peer.commands.empty()


async def test_a_link_that_was_never_used_can_be_closed() -> None:
    async with linked(answering=False) as (peer, link):
        await link.aclose()
        await failed(link.send(("A",), LONG))
        assert peer.opened == 0


async def test_closing_fails_what_waits() -> None:
    async with linked() as (peer, link):
        sent = link.send(("A",), LONG)
        await peer.next()
        await link.aclose()
        assert await failed(sent) < LONG / 2


async def test_closing_fails_what_waits_for_the_connection() -> None:
    async with linked(answering=False) as (peer, link):
        peer.greets = False
        sent = link.send(("A",), LONG)
        await peer.came.wait()
        await link.aclose()
        assert await failed(sent) < LONG / 2


async def test_a_dropped_connection_is_opened_again() -> None:
    async with linked() as (peer, link):
        sent = link.send(("A",), LONG)
        await peer.next()
        link.reset("it is no longer the primary")
        with pytest.raises(StoreUnavailableError, match="it is no longer the primary"):
            await sent
        await open_again(peer, link)
        assert peer.opened == 2


async def test_deadlines_of_every_length_leave_nothing_behind() -> None:
    async with linked() as (peer, link):
        for n in range(2000):
            sent = link.send(("C",), 1 + n * 1e-6)
            peer.say(b"+OK\r\n")
            await sent
        assert link._wire is not None
        assert len(link._wire._deadlines) < 50
