"""The link keeps the loop turning for a moment behind a lone command, and gives that up where it does not help."""

import asyncio
import selectors

from tests.unit.test_link import LONG, linked

LOOKS = 12  # How often a loop may look at its sockets without sleep for one command: to write, and to run what it woke.


class CountingSelector(selectors.DefaultSelector):
    """Counts the looks at sockets that do not sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.looks += timeout is not None and timeout <= 0
        return super().select(timeout)


def test_a_server_that_takes_its_time_is_soon_waited_for_asleep() -> None:
    selector = CountingSelector()

    async def scenario() -> int:
        awake = 0
        async with linked() as (peer, link):
            for _ in range(60):
                before = selector.looks
                reply = link.send(("PING",), LONG)
                await peer.next()
                await asyncio.sleep(0.001)  # longer than the loop is kept turning
                peer.say(b"+PONG\r\n")
                assert await reply == b"PONG"
                awake += selector.looks - before > LOOKS
        return awake

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        assert runner.run(scenario()) <= 2
