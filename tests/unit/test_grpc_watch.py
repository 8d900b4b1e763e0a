"""A watch of our health service, without a server, so that the watcher's pace is ours."""

from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from grpc_interceptors import HealthService
from resilience import HealthChecker

Response = health_pb2.HealthCheckResponse


def watch(checker: HealthChecker) -> Any:
    return HealthService(checker).Watch(health_pb2.HealthCheckRequest(), None)


async def test_a_drain_while_an_answer_is_on_its_way_is_told_before_the_end() -> None:
    checker = HealthChecker()
    answers = watch(checker)
    assert (await anext(answers)).status == Response.SERVING
    checker.drain()
    assert [answer.status async for answer in answers] == [Response.NOT_SERVING]


async def test_a_change_while_an_answer_is_on_its_way_is_told_next() -> None:
    checker = HealthChecker(phase="starting")
    answers = watch(checker)
    assert (await anext(answers)).status == Response.NOT_SERVING
    checker.mark_ready()
    assert (await anext(answers)).status == Response.SERVING
    await answers.aclose()


@pytest.mark.parametrize("last", [HealthChecker.drain, HealthChecker.stop])
async def test_a_status_that_did_not_change_is_not_told_again(last: Any) -> None:
    checker = HealthChecker(phase="starting")
    answers = watch(checker)
    assert (await anext(answers)).status == Response.NOT_SERVING
    last(checker)
    assert [answer async for answer in answers] == []
