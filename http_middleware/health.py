"""Floor 4: the checker over HTTP. Answered before every policy: a probe is never limited, keyed or given an id."""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from http_middleware.routes import inner_path
from resilience.decisions.readiness import ComponentHealth, HealthReport, HealthStatus
from resilience.health import LIVE, READY, STARTUP, HealthChecker

_GROUPS = {"/health": None, "/health/live": LIVE, "/health/ready": READY, "/health/startup": STARTUP}
PATHS = frozenset(_GROUPS)
_HEALTH_JSON = "application/health+json"
_WORDS = {HealthStatus.HEALTHY: "pass", HealthStatus.DEGRADED: "warn", HealthStatus.UNHEALTHY: "fail"}
_TRY_AGAIN = 1  # Seconds that a probe is asked to wait.


def is_probe(scope: Scope) -> bool:
    """Tell whether a scope asks for the service's health."""
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and inner_path(scope) in _GROUPS


class HealthApp:
    """The probes as an application of their own, for a port that nothing but probes uses.

    Args:
        checker: shared with every other door.
    """

    def __init__(self, checker: HealthChecker) -> None:
        self._checker = checker

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer a probe; 404 for anything else."""
        if is_probe(scope):
            await render_health(self._checker, scope, send)
        elif scope["type"] == "http":
            await _send(send, scope, 404, "application/json", {"detail": "Not Found"})


async def render_health(checker: HealthChecker, scope: Scope, send: Send) -> None:
    """Answer a probe.

    ``/health`` tells that the process is alive and asks nothing. Below it, ``/live`` asks the checks of that group,
    ``/ready`` reports in full, ``/startup`` tells whether the service has started. A bearer of the checker's token sees
    details and history. Who accepts ``application/health+json`` gets that.

    Source: draft-inadarei-api-health-check-06, for ``application/health+json``.
    """
    path = inner_path(scope)
    group = _GROUPS[path]
    headers = Headers(scope=scope)
    report = HealthReport(HealthStatus.HEALTHY, checker.version, checker.environment)
    if group is not None:
        report = await checker.run(group)
    authorized = checker.authorizes(_bearer(headers))
    if _HEALTH_JSON in headers.get("accept", ""):
        kind, content = _HEALTH_JSON, _health_json(report, details=authorized)
    else:
        kind, content = "application/json", report.to_dict(details=authorized)
        if not report.components and path != "/health/ready":
            del content["components"]
        elif authorized:
            content["history"] = [{**turn._asdict(), "at": round(turn.at, 3)} for turn in checker.history()]
    await _send(send, scope, 503 if report.status is HealthStatus.UNHEALTHY else 200, kind, content)


def _bearer(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _health_json(report: HealthReport, *, details: bool) -> dict[str, Any]:
    checks = {name: [_checked(found, details=details)] for name, found in report.components.items()}
    shown: dict[str, Any] = {"status": _WORDS[report.status], "version": report.version}
    return {**shown, "checks": checks} if checks else shown


def _checked(found: ComponentHealth, *, details: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"status": _WORDS[found.status]}
    if found.latency_ms is not None:
        shown |= {"observedValue": round(found.latency_ms, 2), "observedUnit": "ms"}
    if found.message is not None and found.status is not HealthStatus.HEALTHY:
        shown["output"] = found.message
    if details and found.details is not None:
        shown["details"] = dict(found.details)
    return shown


async def _send(send: Send, scope: Scope, status: int, kind: str, content: Any) -> None:
    # What a check of the application's own gives as details may be no JSON.
    body = json.dumps(content, separators=(",", ":"), default=str).encode()
    headers = [
        (b"content-type", kind.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    if status == 503:
        headers.append((b"retry-after", str(_TRY_AGAIN).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
