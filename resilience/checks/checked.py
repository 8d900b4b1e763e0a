"""How a check is run and told: from what it does or raises to a ``ComponentHealth`` that may be shown to anybody."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any

from resilience.decisions.readiness import ComponentHealth, HealthStatus
from resilience.errors import ConfigurationError

logger = logging.getLogger("resilience")


class Unmet(Exception):  # noqa: N818 - no error: an answer, and not the one that was hoped for
    """Says what a check found wrong, in words that may leave.

    Args:
        message: for everybody.
        details: for the authorised.
    """

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = details


async def checked(
    name: str, check: Callable[[], Awaitable[Mapping[str, Any] | None]], fine: str = "Connected"
) -> ComponentHealth:
    """Run ``check`` and tell what it found.

    Args:
        name: the component's name.
        check: returns details for the authorised, or None; raises ``Unmet``, or whatever its driver raises.
        fine: the message where it does not raise.

    Raises:
        ConfigurationError: the check was asked for something that can't be.
    """
    started = perf_counter()
    status, message, details = HealthStatus.HEALTHY, fine, None
    try:
        details = await check()
    except ConfigurationError:
        raise
    except Unmet as found:
        status, message, details = HealthStatus.UNHEALTHY, str(found), found.details
    except Exception as error:
        # Its text may quote a URL and the password in it.
        status, message = HealthStatus.UNHEALTHY, "Timed out" if type(error) is TimeoutError else type(error).__name__
    if status is not HealthStatus.HEALTHY:
        # Not louder: the checker tells each turn once, and while a server is gone this comes with every probe.
        logger.debug("The health check of the %s failed: %s", name, message)
    return ComponentHealth(name, status, (perf_counter() - started) * 1000, message, details)
