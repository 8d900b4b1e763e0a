"""A check of free space."""

import shutil
from collections.abc import Mapping
from os import PathLike
from typing import Any

from resilience.checks.checked import Unmet, checked
from resilience.decisions.readiness import ComponentHealth
from resilience.errors import ConfigurationError
from resilience.threads import in_thread


async def check_disk(path: "str | PathLike[str]", min_free: float = 0.05) -> ComponentHealth:
    """Look how much space is left for this process's user. Details tell the authorised how much.

    Args:
        path: a file or folder on the disk that is meant.
        min_free: what must be free: a share of the disk where below 1, else bytes. At least 0.

    Raises:
        ConfigurationError: ``min_free`` is negative.
    """
    if not min_free >= 0:
        raise ConfigurationError("min_free is a share of the disk below 1, or bytes; it can't be negative.")

    async def look() -> Mapping[str, Any]:
        disk = await in_thread(lambda: shutil.disk_usage(path))  # a network's disk may hang
        wanted = min_free * disk.total if min_free < 1 else min_free
        if disk.free < wanted:
            raise Unmet("Too little space", {"free_bytes": disk.free, "total_bytes": disk.total})
        return {"free_bytes": disk.free, "total_bytes": disk.total}

    return await checked("disk", look, "Enough space")
