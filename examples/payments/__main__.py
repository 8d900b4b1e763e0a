"""Serve the demo: one process, one event loop, both doors. Run it with ``./dev run``."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from examples.payments.grpc_door import build_server
from examples.payments.guard import build_pipeline
from examples.payments.http_door import build_app
from examples.payments.logs import configure_logs
from examples.payments.service import PaymentService
from examples.payments.settings import PaymentsSettings
from resilience import ConfigurationError, HealthChecker

HOST = "127.0.0.1"
GRACE = 10.0  # Seconds that running work gets once the doors are closed.


class _HttpServer(uvicorn.Server):
    """uvicorn, with the signals left to the process that also hosts gRPC, and a word when it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.serving.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: PaymentsSettings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs."""
    store = settings.store()
    pipeline = build_pipeline(settings, store)
    checker = HealthChecker("1.0.0", "demo", phase="starting")
    service = PaymentService(settings.processing_seconds)

    grpc_server = build_server(service, pipeline, checker)
    with _bind(settings.http_port) as http_socket:
        app = build_app(service, pipeline, checker)
        http_server = _HttpServer(
            uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=int(GRACE))
        )
        try:
            grpc_port = grpc_server.add_insecure_port(f"{HOST}:{settings.grpc_port}")
        except RuntimeError:
            raise ConfigurationError(f"GRPC_PORT: port {settings.grpc_port} is taken; choose another.") from None
        await grpc_server.start()
        http = asyncio.create_task(http_server.serve([http_socket]))
        stopping = _stop_signal()
        await _first(http, http_server.serving.wait())
        if not http.done():
            checker.mark_ready()
            print(_greeting(http_socket.getsockname()[1], grpc_port), flush=True)  # noqa: T201 - for who started it
            await _first(http, stopping.wait())
        checker.drain()
        await asyncio.sleep(settings.health_drain_seconds)
        http_server.should_exit = True
        await asyncio.gather(http, grpc_server.stop(GRACE))
        await pipeline.drained(GRACE)
        await store.aclose()
        checker.stop()
        if not http_server.serving.is_set():
            raise ConfigurationError("The HTTP door did not start; the log above says why.")


async def _first(task: asyncio.Task[None], other: Coroutine[Any, Any, bool]) -> None:
    await asyncio.wait({task, asyncio.create_task(other)}, return_when=asyncio.FIRST_COMPLETED)


def _bind(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except OSError as error:
        bound.close()
        raise ConfigurationError(f"HTTP_PORT: port {port} can't be used ({error.strerror}); choose another.") from None
    return bound


def _stop_signal() -> asyncio.Event:
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    return stopping


def _greeting(http_port: int, grpc_port: int) -> str:
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    post = '-H \'Content-Type: application/json\' -d \'{"amount": 100, "currency": "EUR"}\''
    client = f"{python} -m examples.payments.client --target {HOST}:{grpc_port}"
    return f"""
Payments on http://{HOST}:{http_port} (try /docs) and grpc://{HOST}:{grpc_port}. Stop it with Ctrl-C.

Take a payment over HTTP, twice; the second answer is the first, replayed:
  curl -si http://{HOST}:{http_port}/api/payments -H 'Idempotency-Key: pay_1' {post}

The same over gRPC:
  {client} create --amount 100 --currency EUR --key pay_2

Is it up?
  curl -s http://{HOST}:{http_port}/health/ready
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
