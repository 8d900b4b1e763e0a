"""How a probe ended."""

import ssl
from typing import NamedTuple

from resilience.probe.arguments import ProbeOptions

SERVING, BAD_ARGUMENTS, NO_CONNECTION, NO_ANSWER, NOT_SERVING = 0, 1, 2, 3, 4
"""The exit codes, which are grpc_health_probe's."""


class Ended(NamedTuple):
    """A probe's exit code, and a line that says why."""

    code: int
    said: str


def not_connected(options: ProbeOptions, error: Exception) -> Ended:
    """Return the end of a probe that found nobody, or nobody in time."""
    if isinstance(error, TimeoutError):
        why = f"timeout: no connection to {options.addr} within {options.connect_timeout:g}s"
        return Ended(NO_CONNECTION, why)
    return Ended(NO_CONNECTION, f"error: no connection to {options.addr}: {why_not(error)}")


def answered_late(options: ProbeOptions) -> Ended:
    """Return the end of a probe that got no answer in time."""
    return Ended(NO_ANSWER, f"timeout: no answer of {options.addr} within {options.rpc_timeout:g}s")


def why_not(error: Exception) -> str:
    """Return what an error of a file or a connection says, in few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
