"""The end of a process: the demo's with both doors, and those that somebody else's command line started."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2

from examples.payments.launch import Launched, launch
from examples.payments.tour import Visitor
from tests.support.redis_servers import RedisServer, binary, free_port

ROOT = Path(__file__).parents[2]
BOUND = 20.0
FOREVER = "300"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
TERM, INT = signal.SIGTERM, signal.SIGINT


async def ended(demo: Launched) -> int:
    return await asyncio.wait_for(demo.process.wait(), BOUND)


def count(demo: Launched, event: str) -> int:
    return sum(json.loads(line)["event"] == event for line in demo.log.read_text().splitlines())


async def logged(demo: Launched, event: str, times: int) -> None:
    async with asyncio.timeout(BOUND):
        while count(demo, event) < times:  # noqa: ASYNC110 - another process's file has no event to wait for
            await asyncio.sleep(0.01)


async def test_both_doors_tell_of_the_drain_at_once_and_serve_until_a_second_signal(tmp_path: Path) -> None:
    async with launch(tmp_path / "log", HEALTH_DRAIN_SECONDS=FOREVER, PROCESSING_SECONDS="0") as demo:
        async with (
            grpc.aio.insecure_channel(demo.grpc) as channel,
            httpx.AsyncClient(base_url=demo.http, trust_env=False) as http,
        ):
            me = Visitor(http, channel)
            watch = me.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            assert (await http.get("/health/ready")).status_code == 200

            demo.process.send_signal(TERM)

            assert (await asyncio.wait_for(watch.read(), BOUND)).status == NOT_SERVING
            assert (await http.get("/health/ready")).status_code == 503
            assert (await http.get("/health/live")).status_code == 200
            over_http, over_grpc = await me.pay_http(), await me.pay_grpc()
            assert (over_http.status_code, over_http.headers["connection"]) == (201, "close")
            assert over_grpc.status is grpc.StatusCode.OK
            assert demo.process.returncode is None
        demo.process.send_signal(TERM)
        assert await ended(demo) == 0


async def test_ctrl_c_needs_no_delay(tmp_path: Path) -> None:
    async with launch(tmp_path / "log", HEALTH_DRAIN_SECONDS=FOREVER) as demo:
        demo.process.send_signal(INT)
        assert await ended(demo) == 0


@pytest.mark.slow
async def test_keyed_payments_that_run_at_sigterm_are_finished_and_kept_for_whoever_asks_again(tmp_path: Path) -> None:
    async with RedisServer(binary()) as redis:
        shared = {"REDIS_URL": redis.url, "PROCESSING_SECONDS": "1"}
        async with (
            launch(tmp_path / "first", **shared) as demo,
            grpc.aio.insecure_channel(demo.grpc) as channel,
            httpx.AsyncClient(base_url=demo.http, trust_env=False) as http,
        ):
            me = Visitor(http, channel)
            stays = [
                asyncio.create_task(me.pay_http(idempotency_key="stays-http")),
                asyncio.create_task(me.pay_grpc(idempotency_key="stays-grpc")),
            ]
            leaves = [
                asyncio.create_task(me.pay_http(idempotency_key="leaves-http")),
                asyncio.create_task(me.pay_grpc(idempotency_key="leaves-grpc")),
            ]
            await logged(demo, "payment started", 4)
            for client in leaves:
                client.cancel()
            demo.process.send_signal(TERM)
            over_http, over_grpc = await stays[0], await stays[1]
            assert await ended(demo) == 0
            assert count(demo, "payment created") == 4
        async with (
            launch(tmp_path / "second", **shared) as demo,
            grpc.aio.insecure_channel(demo.grpc) as channel,
            httpx.AsyncClient(base_url=demo.http, trust_env=False) as http,
        ):
            again = Visitor(http, channel)
            again.api_key = me.api_key
            replies = [await again.pay_http(idempotency_key=key) for key in ("stays-http", "leaves-http")]
            answers = [await again.pay_grpc(idempotency_key=key) for key in ("stays-grpc", "leaves-grpc")]
            assert count(demo, "payment started") == 0
    assert [reply.status_code for reply in replies] == [201, 201]
    assert all(reply.headers["x-idempotent-replayed"] == "true" for reply in replies)
    assert [answer.status for answer in answers] == [grpc.StatusCode.OK] * 2
    assert replies[0].content == over_http.content  # type: ignore[attr-defined] # the first of two kinds of task
    assert answers[0].message == over_grpc.message  # type: ignore[attr-defined] # the second


@dataclass(frozen=True, slots=True)
class Served:
    """A server that a command line started, in a process group of its own, as a terminal would."""

    process: subprocess.Popen[bytes]
    http: httpx.Client
    log: Path

    def until(self, status: int) -> None:
        """Ask whether it is ready, until it says so by ``status``."""
        end = time.monotonic() + BOUND
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health/ready").status_code == status:
                    return
            time.sleep(0.01)  # another process's state has no event to wait for
        raise RuntimeError(self.log.read_text())

    def serves(self) -> bool:
        """Tell whether it does its work, and says that this connection will close."""
        reply = self.http.get("/")
        return (reply.status_code, reply.headers["connection"]) == (200, "close")

    def assert_it_ends(self, *codes: int, lifespans: int = 1) -> None:
        """Wait for the end, which was clean."""
        assert self.process.wait(BOUND) in codes
        log = self.log.read_text()
        assert log.count("The lifespan has ended.") == lifespans
        assert "Traceback" not in log


@contextlib.contextmanager
def uvicorn(folder: Path, *options: str, delay: str) -> Iterator[Served]:
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "uvicorn", "tests.e2e.draining_app:app", "--port", str(port), *options]
    environment = {**os.environ, "HEALTH_DRAIN_SECONDS": delay}
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=BOUND, trust_env=False) as http:
            served = Served(process, http, log)
            served.until(200)
            yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# uvicorn ends by the signal that it was sent; older ones end with 1 after Ctrl-C.
ENDS = {TERM: (0, -TERM), INT: (0, 1, -INT)}


def test_uvicorn_hears_of_sigterm_after_the_delay(tmp_path: Path) -> None:
    with uvicorn(tmp_path, delay="0.5") as served:
        began = time.monotonic()
        served.process.send_signal(TERM)
        served.assert_it_ends(*ENDS[TERM])
        assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize(("loop", "urge"), [("asyncio", TERM), pytest.param("uvloop", INT, marks=pytest.mark.slow)])
def test_until_then_it_is_unready_and_serves_and_a_second_signal_ends_it_at_once(
    loop: str, urge: signal.Signals, tmp_path: Path
) -> None:
    with uvicorn(tmp_path, "--loop", loop, delay=FOREVER) as served:
        served.process.send_signal(TERM)
        served.until(503)
        assert served.serves()
        served.process.send_signal(urge)
        served.assert_it_ends(*ENDS[urge])


def test_ctrl_c_ends_uvicorn_at_once(tmp_path: Path) -> None:
    with uvicorn(tmp_path, delay=FOREVER) as served:
        served.process.send_signal(INT)
        served.assert_it_ends(*ENDS[INT])


@pytest.mark.slow
def test_uvicorns_workers_are_unready_and_serve_until_ctrl_c_reaches_them_all(tmp_path: Path) -> None:
    with uvicorn(tmp_path, "--workers", "2", delay=FOREVER) as served:
        served.process.send_signal(TERM)
        served.until(503)
        assert served.serves()
        os.killpg(served.process.pid, INT)
        served.assert_it_ends(0, lifespans=2)


@pytest.mark.slow
def test_uvicorns_workers_hear_of_sigterm_after_the_delay(tmp_path: Path) -> None:
    with uvicorn(tmp_path, "--workers", "2", delay="0.5") as served:
        served.process.send_signal(TERM)
        served.assert_it_ends(0, lifespans=2)
