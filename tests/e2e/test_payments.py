"""The demo as its users meet it: a process of its own, real clients, real signals."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from examples.payments.launch import Launched, launch
from examples.payments.tour import Visitor

ROOT = Path(__file__).parents[2]


async def run(*command: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def events(launched: Launched, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in launched.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


async def logged(launched: Launched, event: str, count: int) -> None:
    async with asyncio.timeout(10):
        while len(events(launched, event)) < count:  # noqa: ASYNC110 - another process's file has no event to wait for
            await asyncio.sleep(0.01)


async def test_the_tour_is_all_green() -> None:
    code, out, err = await run(sys.executable, "-m", "examples.payments.tour", HTTP_PORT="1", GRPC_PORT="1")
    assert code == 0, out + err
    assert "13 of 13 promises kept." in out
    assert "BROKEN" not in out


async def test_the_tour_finds_a_running_service_and_reads_its_quota(tmp_path: Path) -> None:
    async with launch(tmp_path / "log", RATE_LIMIT_REQUESTS="8") as demo:
        ports = {"HTTP_PORT": demo.http.rpartition(":")[2], "GRPC_PORT": demo.grpc.rpartition(":")[2]}
        code, out, err = await run(sys.executable, "-m", "examples.payments.tour", **ports)
    assert code == 0, out + err
    assert f"Found one on {demo.http}." in out
    assert "5 over HTTP + 3 over gRPC, then 429, RESOURCE_EXHAUSTED" in out


async def test_the_tour_fails_when_a_promise_is_broken(tmp_path: Path) -> None:
    async with launch(tmp_path / "log", RATE_LIMIT_ENABLED="false") as demo:
        ports = {"HTTP_PORT": demo.http.rpartition(":")[2], "GRPC_PORT": demo.grpc.rpartition(":")[2]}
        code, out, _ = await run(sys.executable, "-m", "examples.payments.tour", **ports)
    assert code == 1
    assert "12 of 13 promises kept." in out


async def test_fifty_identical_keyed_payments_over_http_are_one_payment(tmp_path: Path) -> None:
    async with launch(tmp_path / "log") as demo, httpx.AsyncClient(base_url=demo.http, trust_env=False) as http:
        me = Visitor(http, grpc.aio.insecure_channel(demo.grpc))
        replies = await asyncio.gather(*(me.pay_http(idempotency_key="twin") for _ in range(50)))
        late = await me.pay_http(idempotency_key="twin")
        assert len(events(demo, "payment created")) == 1
    assert {reply.status_code for reply in replies} <= {201, 409}
    assert {reply.content for reply in replies if reply.status_code == 201} == {late.content}
    assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 409)


async def test_fifty_identical_keyed_payments_over_grpc_are_one_payment(tmp_path: Path) -> None:
    async with launch(tmp_path / "log") as demo, grpc.aio.insecure_channel(demo.grpc) as channel:
        me = Visitor(httpx.AsyncClient(), channel)
        answers = await asyncio.gather(*(me.pay_grpc(idempotency_key="twin") for _ in range(50)))
        late = await me.pay_grpc(idempotency_key="twin")
        assert len(events(demo, "payment created")) == 1
    assert {answer.status.name for answer in answers} == {"OK"}
    assert all(answer.message == late.message for answer in answers)
    assert sum("x-idempotent-replayed" in answer.trailers for answer in answers) == 49


async def test_every_log_line_of_a_call_carries_its_ids(tmp_path: Path) -> None:
    async with launch(tmp_path / "log") as demo, httpx.AsyncClient(base_url=demo.http, trust_env=False) as http:
        async with grpc.aio.insecure_channel(demo.grpc) as channel:
            me = Visitor(http, channel)
            await me.pay_http(x_correlation_id="over-http")
            await me.pay_grpc(x_correlation_id="over-grpc")
        created = events(demo, "payment created")
    assert [line["correlation_id"] for line in created] == ["over-http", "over-grpc"]
    assert [line["protocol"] for line in created] == ["http", "grpc"]
    assert all(line["request_id"].startswith("req_") for line in created)


async def test_sigterm_finishes_the_payment_that_runs_and_exits_clean(tmp_path: Path) -> None:
    async with launch(tmp_path / "log", PROCESSING_SECONDS="0.5") as demo:
        async with (
            grpc.aio.insecure_channel(demo.grpc) as channel,
            httpx.AsyncClient(base_url=demo.http, trust_env=False) as http,
        ):
            me = Visitor(http, channel)
            payments = [
                asyncio.create_task(me.pay_http(idempotency_key="h")),
                asyncio.create_task(me.pay_grpc(idempotency_key="g")),
            ]
            await logged(demo, "payment started", 2)
            demo.process.send_signal(signal.SIGTERM)
            over_http, over_grpc = await payments[0], await payments[1]
        assert await asyncio.wait_for(demo.process.wait(), 20) == 0
        assert len(events(demo, "payment created")) == 2
    assert over_http.status_code == 201  # type: ignore[attr-defined] # the first of two kinds of task
    assert over_grpc.status is grpc.StatusCode.OK  # type: ignore[attr-defined] # the second


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RATE_LIMIT_REQUESTS", "many"),
        ("RATE_LIMIT_REQUESTS", "0"),
        ("RATE_LIMIT_WINDOW", "-1"),
        ("GRPC_PORT", "99999"),
    ],
)
async def test_a_wrong_variable_stops_the_start_and_is_named(variable: str, value: str) -> None:
    code, out, err = await run(sys.executable, "-m", "examples.payments", **{variable: value})
    assert code == 2
    assert f"payments: The environment is wrong. {variable}: " in err
    assert "Traceback" not in err
    assert "Payments on" not in out


async def test_a_taken_port_stops_the_start_and_is_named(tmp_path: Path) -> None:
    async with launch(tmp_path / "log") as demo:
        for name, address in (("HTTP_PORT", demo.http), ("GRPC_PORT", demo.grpc)):
            taken = address.rpartition(":")[2]
            ports = {"HTTP_PORT": "0", "GRPC_PORT": "0", name: taken}
            code, out, err = await run(sys.executable, "-m", "examples.payments", **ports)
            assert code == 2
            assert f"payments: {name}: port {taken} can't be used" in err
            assert "Traceback" not in err
            assert "Payments on" not in out


async def test_the_printed_lines_work_as_printed() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not on PATH")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "examples.payments",
        cwd=ROOT,
        env={**os.environ, "HTTP_PORT": "0", "GRPC_PORT": "0", "HEALTH_DRAIN_SECONDS": "0"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    printed = ""
    while "Is it up?" not in printed or printed.count("health") < 2:
        printed += (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
    commands = re.findall(r"^  (\S.*)$", printed, re.MULTILINE)
    answers = [await run("sh", "-c", command) for command in (commands[0], *commands)]
    process.terminate()
    await process.wait()
    assert [code for code, _, _ in answers] == [0] * 5
    first, second, over_grpc, ready, serving = (out for _, out, _ in answers)
    assert "201 Created" in first
    assert "x-idempotent-replayed: true" in second
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert '"status": "accepted"' in over_grpc
    assert json.loads(ready)["status"] == "healthy"
    assert "SERVING" in serving


async def test_reflection_and_the_openapi_page_are_served(tmp_path: Path) -> None:
    async with launch(tmp_path / "log") as demo, httpx.AsyncClient(base_url=demo.http, trust_env=False) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
        assert (await http.get("/docs")).status_code == 200

        def reflect() -> list[str]:
            with grpc.insecure_channel(demo.grpc) as channel:
                return list(ProtoReflectionDescriptorDatabase(channel).get_services())

        services = await asyncio.to_thread(reflect)
    assert {"/api/payments", "/api/payments/{payment_id}", "/api/payments/{payment_id}/events"} <= paths.keys()
    assert {"examples.payments.v1.PaymentService", "grpc.health.v1.Health"} <= set(services)
