"""Floor 4: the running call's ids on the requests that it sends on. Duck-typed: imports no HTTP client.

Works with ``httpx`` and ``httpx2``: a request's ``url.host``, ``headers`` and ``extensions`` are all that is touched.
"""

import re
from collections.abc import Awaitable, Callable, Collection
from ipaddress import ip_address
from typing import Any

from resilience import wire
from resilience.context import get_tracing_headers
from resilience.errors import ConfigurationError

_HOST = re.compile(r"\.?[\w-]+(\.[\w-]+)*")
_SENT = "resilience.tracing"
"""The request extension that remembers what a hook added: a client copies it, like the headers, into a redirect."""


def tracing_hook(*, allowed_hosts: Collection[str]) -> Callable[[Any], None]:
    """Return a request hook that sends the running call's ids, trace and deadline on to services of one's own.

    ``httpx.Client(event_hooks={"request": [tracing_hook(allowed_hosts={"orders", ".internal.example"})]})``

    To any other host nothing is sent, also when an allowed one redirects to it. A header that the application set
    itself stays as it is. The user and the tenant are never sent.

    Args:
        allowed_hosts: host names or addresses without a port; ``.example.com`` stands for every name below
            ``example.com``, without that one itself. Case makes no difference.

    Raises:
        ConfigurationError: an allowed host is no host, or one string was given instead of several.
    """
    exact, below = _split(allowed_hosts)

    def hook(request: Any) -> None:
        _take_back(request)
        host: str = request.url.host.lower()
        if host in exact or host.endswith(below):
            _add(request)

    return hook


def async_tracing_hook(*, allowed_hosts: Collection[str]) -> Callable[[Any], Awaitable[None]]:
    """Return what ``tracing_hook`` does, for an ``AsyncClient``, whose hooks are awaited."""
    hook = tracing_hook(allowed_hosts=allowed_hosts)

    async def async_hook(request: Any) -> None:
        hook(request)

    return async_hook


def _split(allowed_hosts: Collection[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    if isinstance(allowed_hosts, str):
        raise ConfigurationError(
            f"allowed_hosts: a collection of host names is needed, not the string {allowed_hosts!r}"
        )
    names = {host.lower() for host in allowed_hosts}
    for name in names:
        if not _HOST.fullmatch(name) and not _is_address(name):
            raise ConfigurationError(
                f"allowed_hosts: {name!r} is no host name, address or .suffix (no scheme, no port)"
            )
    below = tuple(name for name in names if name.startswith("."))
    return frozenset(names.difference(below)), below


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _take_back(request: Any) -> None:
    """Remove what a hook added to the request that this one repeats or follows, if nobody changed it since."""
    for name, value in request.extensions.get(_SENT, {}).items():
        if request.headers.get(name) == value:
            del request.headers[name]


def _add(request: Any) -> None:
    headers = get_tracing_headers()
    if wire.TRACEPARENT in request.headers:
        headers.pop(wire.TRACESTATE, None)  # it belongs to the traceparent that is not sent
    added = {name: value for name, value in headers.items() if name not in request.headers}
    request.headers.update(added)
    request.extensions = {**request.extensions, _SENT: added}
