"""The payments service as a process under load: ``python -m benchmarks.load_server bare|guarded [REDIS_URL]``.

Bare is the same application and servicer without ``install`` and interceptor. Both write no log below a warning, so
that what is left to compare is the guard. The first line on standard output has the ports; each line on standard input
is answered with one that says what the process did so far; the end of standard input ends it.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, process_time
from unittest.mock import patch

import grpc
import structlog
from starlette.types import ASGIApp

from examples.payments import http_door
from examples.payments.grpc_door import PaymentServicer, build_server, listen
from examples.payments.guard import build_pipeline
from examples.payments.service import Payment, PaymentService
from examples.payments.settings import PaymentsSettings
from examples.payments.v1 import payments_pb2_grpc
from http_middleware.server import UvicornServer
from resilience import HealthChecker, Pipeline
from resilience.lifecycle import run

HOST = "127.0.0.1"
MANY = 2**31 - 1  # Requests a minute: no caller is refused.
_BEAT = 0.01  # Seconds between two looks at whether the loop stands still.


class CountedService(PaymentService):
    """Counts the payments that it took."""

    taken = 0

    async def create(self, amount: int, currency: str) -> Payment:
        """Take a payment."""
        payment = await super().create(amount, currency)
        self.taken += 1
        return payment


class Stalls:
    """The longest that the event loop stood still since it was last asked, in seconds."""

    def __init__(self) -> None:
        self._worst = 0.0

    async def watch(self) -> None:
        """Look on until cancelled."""
        while True:
            before = monotonic()
            await asyncio.sleep(_BEAT)
            self._worst = max(self._worst, monotonic() - before - _BEAT)

    def take(self) -> float:
        """Return the longest, and forget it."""
        worst, self._worst = self._worst, 0.0
        return worst


def bare(service: PaymentService) -> tuple[ASGIApp, grpc.aio.Server]:
    """Return both doors with nothing in front of them."""
    with patch.object(http_door, "install", lambda *_, **__: None):
        app = http_door.build_app(service, Pipeline(), HealthChecker("1"))
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    payments_pb2_grpc.add_PaymentServiceServicer_to_server(PaymentServicer(service), server)
    return app, server


def resident() -> int:
    """Return the bytes of memory that this process has, or 0 where the system does not tell."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


async def _answer(service: CountedService, stalls: Stalls) -> None:
    """Answer each line until there are no more."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        told = {"payments": service.taken, "cpu": process_time(), "resident": resident(), "stall": stalls.take()}
        print(json.dumps(told), flush=True)


async def serve(*, guarded: bool, redis: str | None) -> None:
    """Serve until standard input ends."""
    settings = PaymentsSettings(
        _env_file=None, processing_seconds=0, rate_limit_requests=MANY, rate_limit_window=60, redis_url=redis
    )
    service, checker, stalls = (
        CountedService(settings.processing_seconds),
        HealthChecker("1", phase="starting"),
        Stalls(),
    )
    pipeline = build_pipeline(settings, settings.store()) if guarded else None
    if pipeline is None:
        app, server = bare(service)
    else:
        app, server = http_door.build_app(service, pipeline, checker), build_server(service, pipeline, checker)
    http = UvicornServer(app, host=HOST, port=0, log_config=None, access_log=False)
    port = listen(server, HOST, 0, "gRPC")
    payment = await service.create(100, "EUR")

    def tell() -> None:
        print(json.dumps({"http": http.port, "grpc": port, "payment": payment.id}), flush=True)

    serving = asyncio.create_task(
        run(server, http, checker=checker, pipeline=pipeline, delay=0, grace=1, on_ready=tell)
    )
    asked = asyncio.create_task(_answer(service, stalls))
    watching = asyncio.create_task(stalls.watch())
    await asyncio.wait({serving, asked}, return_when=asyncio.FIRST_COMPLETED)
    for task in (watching, asked, serving):
        task.cancel()
    await asyncio.wait({watching, asked, serving})
    if not serving.cancelled():
        serving.result()


def main(variant: str, redis: str | None = None) -> None:
    """Serve on uvloop where it is installed, as uvicorn would by itself."""
    logging.basicConfig(level=logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        import uvloop  # noqa: PLC0415 - as uvicorn: faster with it, and good without

        new_loop = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve(guarded=variant == "guarded", redis=redis))


if __name__ == "__main__":
    main(*sys.argv[1:])
