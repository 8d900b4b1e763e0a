"""Floor 4: the checker over HTTP. Answered before every policy: a probe is never limited, keyed or given an id."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope, Send

from http_middleware.call import inner_path
from resilience.decisions.readiness import HealthStatus
from resilience.health import HealthChecker

PATHS = frozenset({"/health", "/health/live", "/health/ready", "/health/startup"})


def is_probe(scope: Scope) -> bool:
    """Tell whether a scope asks for the service's health."""
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and inner_path(scope) in PATHS


async def render_health(checker: HealthChecker, scope: Scope, send: Send) -> None:
    """Answer a probe: ``/health`` and ``/health/live`` for life, ``/ready`` with the full report, ``/startup``."""
    path = inner_path(scope)
    content: Mapping[str, Any] = await checker.run_quick()
    status = 200
    if path == "/health/ready":
        report = await checker.run()
        content = report.to_dict()
        status = 503 if report.status is HealthStatus.UNHEALTHY else 200
    elif path == "/health/startup" and checker.phase == "starting":
        content, status = {**content, "status": HealthStatus.UNHEALTHY.value}, 503
    body = json.dumps(content, separators=(",", ":")).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
