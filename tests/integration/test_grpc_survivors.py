"""A keyed handler survives its client; and whoever uses a context too late lives on."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from resilience import IdempotencyPolicy, MemoryStore, Pipeline, get_correlation_id, get_request_id
from resilience.policies.waiting import OnTwin
from tests.integration.grpc_world import (
    GO,
    SECRET,
    STYLES,
    Pair,
    Waits,
    Witness,
    ask,
    complaints,
    make_server,
    serving,
    start,
)

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
ROOT = Path(__file__).parents[2]
SEEN = "('ipv4:127.0.0.1', 'by the client', True)"
unary = STYLES["unary_unary"].make

SCENARIOS = {
    "keyed_looks": f"{SEEN} True\nOK [b'done'] late",
    "keyed_looks_after_its_deadline": f"DEADLINE_EXCEEDED {SEEN} True",
    "keyed_aborts": "True\nINVALID_ARGUMENT Late late",
    "keyed_crashes": "True\nOK 2",
    "keyed_uses_the_rest": "True\nOK",
    "keyed_leaves_a_task_behind": SEEN,
    "leaves_a_task_behind": SEEN,
    "shields_its_work": SEEN,
    "swallows_its_cancellation": SEEN,
    "generator_cleans_up": SEEN,
    "callback_looks": SEEN,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_context_that_is_used_after_its_rpc_does_not_end_the_process(scenario: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.integration.grpc_survivors", scenario],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == SCENARIOS[scenario]


def keyed() -> Pipeline:
    return Pipeline([IdempotencyPolicy(MemoryStore())])


async def test_a_client_that_cancels_finds_the_reply_on_its_retry_and_the_handler_ran_once() -> None:
    act, pipeline = Waits(), keyed()
    async with serving(unary(act), pipeline=pipeline) as channel:
        call = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        call.cancel()
        assert await call.code() is StatusCode.CANCELLED
        act.gate.set()
        assert await pipeline.drained(5)
        end = await ask(channel, GO, "unary_unary", KEY)
    assert (end.code, end.replies, end.get("x-idempotent-replayed")) == (StatusCode.OK, [b"done"], "true")
    assert (act.runs, act.cut.is_set()) == (1, False)


async def test_a_client_whose_deadline_passes_finds_the_reply_on_its_retry_and_the_handler_ran_once() -> None:
    act, pipeline = Waits(), keyed()
    async with serving(unary(act), pipeline=pipeline) as channel:
        end = await ask(channel, GO, "unary_unary", KEY, deadline=0.2)
        assert end.code is StatusCode.DEADLINE_EXCEEDED
        act.gate.set()
        assert await pipeline.drained(5)
        end = await ask(channel, GO, "unary_unary", KEY)
    assert (end.replies, act.runs, act.cut.is_set()) == ([b"done"], 1, False)


@pytest.mark.parametrize("in_progress", ["reject", "wait"])
async def test_a_retry_that_comes_while_the_handler_survives_is_told_when_to_come_back_or_waits(
    in_progress: OnTwin,
) -> None:
    act, over = Waits(), asyncio.Event()
    pipeline = Pipeline([IdempotencyPolicy(MemoryStore(), in_progress=in_progress)])

    async def first(context: Any) -> bytes:
        context.add_done_callback(lambda _context: over.set())
        return await act(context)

    async with serving(unary(first), pipeline=pipeline) as channel:
        call = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        call.cancel()
        await over.wait()
        retry = asyncio.create_task(ask(channel, GO, "unary_unary", KEY))
        if in_progress == "reject":
            end = await retry
            assert end.code is StatusCode.ABORTED
            assert int(end.get("grpc-retry-pushback-ms") or 0) >= 1
        act.gate.set()
        if in_progress == "wait":
            assert (await retry).replies == [b"done"]
        assert await pipeline.drained(5)
    assert act.runs == 1


async def test_drained_tells_that_work_still_runs_when_its_time_is_up() -> None:
    act, pipeline = Waits(), keyed()
    async with serving(unary(act), pipeline=pipeline) as channel:
        call = start(channel, GO, "unary_unary", KEY)
        await act.entered.wait()
        call.cancel()
        assert not await pipeline.drained(0.01)
        act.gate.set()
        assert await pipeline.drained(5)


async def test_a_survivor_keeps_the_ids_of_its_call() -> None:
    ids: list[tuple[str | None, str | None]] = []
    waits, pipeline = Waits(), keyed()

    async def act(context: Any) -> bytes:
        ids.append((get_request_id(), get_correlation_id()))
        await waits(context)
        ids.append((get_request_id(), get_correlation_id()))
        return b"done"

    async with serving(unary(act), pipeline=pipeline) as channel:
        call = start(channel, GO, "unary_unary", KEY, ("x-correlation-id", "chain-1"))
        await waits.entered.wait()
        call.cancel()
        await call.code()
        waits.gate.set()
        assert await pipeline.drained(5)
    assert ids[0] == ids[1]
    assert ids[0][0]
    assert ids[0][1] == "chain-1"


async def test_a_survivor_that_fails_is_logged_with_its_ids_and_its_retry_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waits, pipeline, over = Waits(), keyed(), asyncio.Event()

    async def act(context: Any) -> bytes:
        context.add_done_callback(lambda _context: over.set())
        await waits(context)
        if waits.runs == 1:
            raise ValueError(SECRET)
        return b"done"

    async with serving(unary(act), pipeline=pipeline) as channel:
        call = start(channel, GO, "unary_unary", KEY, ("x-correlation-id", "chain-1"))
        await waits.entered.wait()
        call.cancel()
        await over.wait()
        waits.gate.set()
        assert await pipeline.drained(5)
        end = await ask(channel, GO, "unary_unary", KEY)
    assert (end.code, end.replies, waits.runs) == (StatusCode.OK, [b"done"], 2)
    (record,) = complaints(caplog)
    assert record.getMessage() == f"{GO} failed after its client left"
    assert record.__dict__["correlation_id"] == "chain-1"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_a_server_that_stops_at_once_loses_no_keyed_work() -> None:
    act, pipeline, store = Waits(), keyed(), MemoryStore()
    pipeline = Pipeline([IdempotencyPolicy(store)])
    async with asyncio.timeout(10):
        server = make_server(pipeline, {GO: unary(act)})
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = start(channel, GO, "unary_unary", KEY)
            await act.entered.wait()
            await server.stop(None)
            assert await call.code() is StatusCode.UNAVAILABLE
        act.gate.set()
        assert await pipeline.drained(5)
    async with serving(unary(act), IdempotencyPolicy(store)) as channel:
        end = await ask(channel, GO, "unary_unary", KEY)
    assert (end.replies, end.get("x-idempotent-replayed"), act.runs) == ([b"done"], "true", 1)


async def test_a_call_without_a_key_does_not_survive_its_client() -> None:
    act, pipeline, witness = Waits(), keyed(), Witness()
    pipeline = Pipeline([*pipeline.core, witness])
    async with serving(unary(act), pipeline=pipeline) as channel:
        call = start(channel)
        await act.entered.wait()
        call.cancel()
        await act.cut.wait()
        assert (await witness.outcomes.get()).ended == "cancelled"
        assert await pipeline.drained(0)
