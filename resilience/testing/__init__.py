"""Public: what tests of a service, or of a store of your own, need. Nothing here is for production."""

from resilience.testing.clock import ManualClock
from resilience.testing.contract import StoreContract
from resilience.testing.faults import FaultyStore

__all__ = ["FaultyStore", "ManualClock", "StoreContract"]
