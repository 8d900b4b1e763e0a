"""A check of the store that the policies share."""

from resilience.checks.checked import checked
from resilience.decisions.quota import Quota
from resilience.decisions.readiness import ComponentHealth
from resilience.stores.base import RateLimitStore, Want

_LOOK = (Want("health", "health", Quota(1, per=1), 0),)  # A cost of 0 counts nothing.


async def check_store(store: RateLimitStore) -> ComponentHealth:
    """Look at a count, as a rate limit does, within the store's own deadline. Of a cluster it asks one node.

    Add it with ``scope="shared", critical=False``. The policies go on without their store, each as it declares; a
    service that called itself unready then would be gone from every process at once.
    """

    async def look() -> None:
        await store.acquire(_LOOK)

    return await checked("store", look)
