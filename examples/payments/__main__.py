"""Serve the demo: one process, one event loop, both doors. Run it with ``./dev run``."""

import asyncio
import os
import sys
from functools import partial
from pathlib import Path

from examples.payments.grpc_door import SERVICE, build_server, listen
from examples.payments.guard import build_pipeline
from examples.payments.http_door import build_app
from examples.payments.logs import configure_logs
from examples.payments.service import PaymentService
from examples.payments.settings import PaymentsSettings
from grpc_interceptors import health_server
from http_middleware.server import UvicornServer
from resilience import ConfigurationError, HealthChecker, check_store
from resilience.lifecycle import Server, run

GRACE = 10.0  # Seconds that running work gets once the doors are closed.


async def serve(settings: PaymentsSettings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs."""
    store = settings.store()
    pipeline = build_pipeline(settings, store)
    token = settings.health_token
    checker = HealthChecker("1.0.0", "demo", phase="starting", token=token.get_secret_value() if token else None)
    checker.add_check("store", partial(check_store, store), scope="shared", critical=False)
    service = PaymentService(settings.processing_seconds)
    app = build_app(service, pipeline, checker)
    http = UvicornServer(app, host=settings.host, port=settings.http_port, name="HTTP_PORT", log_config=None)
    grpc_server = build_server(service, pipeline, checker)
    grpc_port = listen(grpc_server, settings.host, settings.grpc_port, "GRPC_PORT")
    servers: list[Server] = [grpc_server, http]
    if settings.health_port is not None:
        probes = health_server(checker, [SERVICE])
        listen(probes, settings.host, settings.health_port, "HEALTH_PORT")
        servers.append(probes)
    await run(
        *servers,
        checker=checker,
        pipeline=pipeline,
        store=store,
        delay=settings.health_drain_seconds,
        grace=GRACE,
        on_ready=lambda: print(_greeting(http.port, grpc_port), flush=True),  # noqa: T201 - for who started it
    )


def _greeting(http_port: int, grpc_port: int) -> str:
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    post = '-H \'Content-Type: application/json\' -d \'{"amount": 100, "currency": "EUR"}\''
    client = f"{python} -m examples.payments.client --target 127.0.0.1:{grpc_port}"
    return f"""
Payments on http://127.0.0.1:{http_port} (try /docs) and grpc://127.0.0.1:{grpc_port}. Stop it with Ctrl-C.

Take a payment over HTTP, twice; the second answer is the first, replayed:
  curl -si http://127.0.0.1:{http_port}/api/payments -H 'Idempotency-Key: pay_1' {post}

The same over gRPC:
  {client} create --amount 100 --currency EUR --key pay_2

Is it up?
  curl -s http://127.0.0.1:{http_port}/health/ready
  {client} health
"""


def main() -> int:
    """Run the demo; return the exit code."""
    configure_logs()
    try:
        asyncio.run(serve(PaymentsSettings.load()))
    except ConfigurationError as error:
        print(f"payments: {error}", file=sys.stderr)  # noqa: T201 - as above
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
