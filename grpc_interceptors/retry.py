"""Floor 4: how gRPC's own retries are told to honour our pushback. A default channel never retries."""

import json
from collections.abc import Iterable

import grpc

from resilience.errors import ConfigurationError

_MOST_ATTEMPTS = 5  # Source: gRFC A6, "maxAttempts": clients treat more as 5.


def retry_service_config(
    methods: Iterable[str],
    *,
    codes: Iterable[grpc.StatusCode] = (grpc.StatusCode.RESOURCE_EXHAUSTED,),
    max_attempts: int = 4,
    initial_backoff: float = 0.1,
    max_backoff: float = 2.0,
) -> list[tuple[str, int | str]]:
    """Return the channel options under which gRPC retries a refused call when the server has said.

    ``grpc.aio.insecure_channel(target, options=retry_service_config(["/pkg.Service/Method"]))``. A server that says
    nothing is asked again after a jittered backoff.

    Args:
        methods: ``"/pkg.Service/Method"``, or ``"/pkg.Service"`` for all of its methods.
        codes: which refusals are retried. A call over its quota never reached the handler, so it may always be. With an
            idempotency key, add ABORTED (a twin runs) and UNAVAILABLE (the server drains, or broke off).
        max_attempts: 2 to 5, the first one included.
        initial_backoff, max_backoff: seconds, > 0.

    Raises:
        ConfigurationError: a value is out of range, or a name is no method's.
    """
    if not 2 <= max_attempts <= _MOST_ATTEMPTS:
        raise ConfigurationError(f"max_attempts must be 2 to {_MOST_ATTEMPTS}, not {max_attempts}.")
    if not 0 < initial_backoff <= max_backoff:
        raise ConfigurationError("Backoffs must be over 0 seconds, the first at most the last.")
    retried = sorted(code.name for code in codes)
    if not retried or "OK" in retried:
        raise ConfigurationError("Name at least one code to retry, and not OK.")
    policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": f"{initial_backoff:.3f}s",
        "maxBackoff": f"{max_backoff:.3f}s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": retried,
    }
    config = {"methodConfig": [{"name": [_name(method) for method in methods], "retryPolicy": policy}]}
    return [("grpc.enable_retries", 1), ("grpc.service_config", json.dumps(config))]


def _name(method: str) -> dict[str, str]:
    start, _, rest = method.partition("/")
    service, _, name = rest.partition("/")
    if start or not service or "/" in name:
        raise ConfigurationError(f"{method!r} is neither '/pkg.Service/Method' nor '/pkg.Service'.")
    return {"service": service, "method": name} if name else {"service": service}
