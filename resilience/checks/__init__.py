"""The floor above health: checks of what services depend on. Their messages hold no text of a driver's.

They ask on the application's own connections, and open none of their own unless they say so. They never raise, but for
a ``ConfigurationError``: whatever goes wrong makes the component unhealthy, by the name of the exception's class. How
long a probe waits for one is for the ``HealthChecker`` that asks it; ``timeout`` here says when a check gives up what
it began, so that one that hangs with its server does not outlive the server's return.
"""

from resilience.checks.database import check_database
from resilience.checks.disk import check_disk
from resilience.checks.event_loop import EventLoopLag
from resilience.checks.network import check_http, check_redis, check_tcp
from resilience.checks.store import check_store

__all__ = ["EventLoopLag", "check_database", "check_disk", "check_http", "check_redis", "check_store", "check_tcp"]
