"""Floor 2: says once that a store went, and once that it came back, however many calls notice."""

import logging

from resilience.errors import StoreUnavailableError

logger = logging.getLogger("resilience")


class Outage:
    """Whether a policy's store is gone, as far as its calls have seen.

    Args:
        meanwhile: what the policy does while it is: "rate limits are not enforced".
    """

    def __init__(self, meanwhile: str) -> None:
        self._meanwhile = meanwhile
        self._gone = False

    def began(self, error: StoreUnavailableError) -> None:
        """Note that a call found no store."""
        if not self._gone:
            self._gone = True
            logger.warning("Until the store is back, %s: %s", self._meanwhile, error)

    def ended(self) -> None:
        """Note that a call found the store."""
        if self._gone:
            self._gone = False
            logger.warning("The store is back: no longer, %s", self._meanwhile)
