"""One contract, every store."""

from itertools import count

from resilience import MemoryStore
from resilience.stores.base import Store
from resilience.testing import ManualClock, StoreContract


class TestMemoryStore(StoreContract):
    _names = count()

    def setup_method(self) -> None:
        self._clock = ManualClock()

    async def make_store(self) -> Store:
        return MemoryStore(clock=self._clock)

    async def advance(self, seconds: float) -> None:
        self._clock.advance(seconds)

    def unique(self, name: str) -> str:
        return f"{name}-{next(self._names)}"
