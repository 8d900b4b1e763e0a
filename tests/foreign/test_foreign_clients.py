"""The gRPC door as others' clients meet it: grpc_health_probe, grpcurl, and a program of grpc-go."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from examples.payments.launch import Launched, launch
from examples.payments.v1 import payments_pb2 as pb
from grpc_interceptors import add_health, retry_service_config
from resilience import HealthChecker, MemoryStore, Pipeline, Quota, RateLimitPolicy, Rule
from resilience.policies.rule import everyone
from tests.foreign.programs import call_from_go, find_program, probe, run_program
from tests.integration.grpc_world import GO, KINDS, SERVICE, STYLES, Counts, make_server

SERVING, NOBODY, UNKNOWN, NOT_SERVING = 0, 2, 3, 4
PAYMENTS = "examples.payments.v1.PaymentService"
PAY = f"/{PAYMENTS}/CreatePayment"
EUROS = pb.CreatePaymentRequest(amount=100, currency="EUR")
BY_KIND = {style.kind: style for style in STYLES.values()}

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one demo serves all; each test is a caller of its own


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def demo(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Launched]:
    log = tmp_path_factory.mktemp("foreign") / "log"
    async with launch(log, RATE_LIMIT_REQUESTS="3", RATE_LIMIT_WINDOW="60", PROCESSING_SECONDS="0.1") as launched:
        yield launched


class Arrivals(grpc.aio.ServerInterceptor):
    """Listed before ours: counts the attempts that reach the server, however they end."""

    def __init__(self) -> None:
        self.attempts = 0

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        self.attempts += 1
        return await continuation(handler_call_details)


@asynccontextmanager
async def served(server: grpc.aio.Server) -> AsyncIterator[str]:
    async with asyncio.timeout(30):
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)


def limited(quota: Quota, act: Counts, kind: str, *before: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    pipeline = Pipeline([RateLimitPolicy(MemoryStore(), Rule(quota, key=everyone))])
    return make_server(pipeline, {GO: BY_KIND[kind].make(act)}, *before)


def patient(backoff: float, method: str = GO, code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED) -> str:
    """Return our own retry policy as the JSON that every gRPC client reads."""
    options = dict(retry_service_config([method], codes=[code], initial_backoff=backoff, max_backoff=backoff))
    return str(options["grpc.service_config"])


def taken(demo: Launched, correlation_id: str) -> int:
    """Return how many payments were taken by calls of that correlation id."""
    lines = [json.loads(line) for line in demo.log.read_text().splitlines()]
    return sum(line["event"] == "payment created" and line["correlation_id"] == correlation_id for line in lines)


async def test_the_probe_follows_a_service_from_its_start_to_its_drain() -> None:
    checker = HealthChecker("1.0.0", "test", phase="starting")
    server = grpc.aio.server()
    add_health(server, checker, [SERVICE])
    async with served(server) as address:
        assert await probe(address) == NOT_SERVING
        checker.mark_ready()
        assert await probe(address) == SERVING
        assert await probe(address, SERVICE) == SERVING
        assert await probe(address, "test.Nothing") == UNKNOWN
        checker.drain()
        assert await probe(address, SERVICE) == NOT_SERVING
    assert await probe(address, patience="200ms") == NOBODY


async def test_the_probe_sees_the_demo_drain_on_sigterm(tmp_path: Path) -> None:
    async with launch(tmp_path / "log", HEALTH_DRAIN_SECONDS="60") as demo:
        try:
            assert await probe(demo.grpc, PAYMENTS) == SERVING
            demo.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                while (code := await probe(demo.grpc, PAYMENTS)) == SERVING:
                    pass
        finally:
            demo.process.kill()  # the rest of its minute is of no interest
            await demo.process.wait()
    assert code == NOT_SERVING


async def test_a_limit_that_is_used_up_for_everybody_fails_no_probe() -> None:
    act = Counts()
    server = limited(Quota(1, per=3600), act, "unary_unary")
    add_health(server, HealthChecker("1.0.0", "test"), [SERVICE])
    async with served(server) as address:
        first, second = await call_from_go(address, GO, calls=2)
        probes = await asyncio.gather(*(probe(address, SERVICE) for _ in range(3)))
    assert (first.code, second.code, act.runs) == ("OK", "ResourceExhausted", 1)
    assert probes == [SERVING] * 3


async def grpcurl(demo: Launched, caller: str, *options: str, reflect: bool = False) -> tuple[int, str, dict[str, Any]]:
    """Pay with grpcurl; return its exit code, what it said, and the reply or the error as it decoded them."""
    schema = () if reflect else ("-import-path", "proto", "-proto", "examples/payments/v1/payments.proto")
    who = ("-H", f"x-api-key: {caller}", "-H", f"x-correlation-id: {caller}")
    call = ("-d", '{"amount": 100, "currency": "EUR"}', demo.grpc, f"{PAYMENTS}/CreatePayment")
    path = find_program("grpcurl")
    done = await run_program(
        path, "-plaintext", "-v", "-format-error", "-max-time", "20", *schema, *who, *options, *call
    )
    decoded = re.search(r"^\{$.*?^\}$", done.err or done.out, re.MULTILINE | re.DOTALL)
    return done.code, done.out, json.loads(decoded[0]) if decoded else {}


def trailers(said: str) -> dict[str, str]:
    """Return the trailers that grpcurl printed."""
    lines = said.partition("Response trailers received:\n")[2].splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def by_type(error: dict[str, Any]) -> dict[str, Any]:
    """Return the details of an error; the server's reflection told grpcurl how to read them."""
    return {detail["@type"].rpartition("/")[2]: detail for detail in error["details"]}


@pytest.mark.parametrize("reflect", [False, True], ids=["proto", "reflection"])
async def test_grpcurl_pays_twice_with_one_key_and_gets_one_payment(demo: Launched, reflect: bool) -> None:
    caller, key = f"curl-key-{reflect}", ("-H", "idempotency-key: order-1")
    code, said, payment = await grpcurl(demo, caller, *key, reflect=reflect)
    again, said_again, replayed = await grpcurl(demo, caller, *key, reflect=reflect)
    first, second = trailers(said), trailers(said_again)
    assert (code, again) == (0, 0)
    assert payment == replayed
    assert payment["amount"] == "100"
    assert "x-idempotent-replayed" not in first
    assert second["x-idempotent-replayed"] == "true"
    assert first["x-correlation-id"] == second["x-correlation-id"] == caller
    assert first["x-request-id"] != second["x-request-id"]
    assert taken(demo, caller) == 1


async def test_grpcurl_decodes_why_it_was_limited(demo: Launched) -> None:
    codes = [(await grpcurl(demo, "curl-limit", reflect=True))[0] for _ in range(3)]
    code, said, error = await grpcurl(demo, "curl-limit", reflect=True)
    told = trailers(said)
    details = by_type(error)
    assert codes == [0, 0, 0]
    assert (code, error["code"]) == (64 + 8, 8)
    assert details["google.rpc.ErrorInfo"]["reason"] == "RATE_LIMITED"
    assert 30 < float(details["google.rpc.RetryInfo"]["retry_delay"].removesuffix("s")) <= 61
    assert details["google.rpc.QuotaFailure"]["violations"][0]["quota_value"] == "3"
    assert told["grpc-retry-pushback-ms"] == "-1"
    assert told["x-ratelimit-remaining"] == "0"
    assert told["x-request-id"].startswith("req_")
    assert told["x-correlation-id"] == "curl-limit"
    assert "Response headers received:\n(empty)" in said  # so that a client may still retry


async def test_grpcurl_is_told_that_its_key_is_malformed(demo: Launched) -> None:
    code, said, error = await grpcurl(demo, "curl-malformed", "-H", 'idempotency-key: a"b', reflect=True)
    details = by_type(error)
    assert (code, error["code"]) == (64 + 3, 3)
    assert details["google.rpc.ErrorInfo"]["reason"] == "IDEMPOTENCY_KEY_MALFORMED"
    assert "google.rpc.BadRequest" in details
    assert trailers(said)["x-correlation-id"] == "curl-malformed"
    assert taken(demo, "curl-malformed") == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_grpc_go_over_its_limit_waits_as_told_and_has_its_answer_on_the_second_attempt(kind: str) -> None:
    act, arrivals = Counts(), Arrivals()
    async with served(limited(Quota(1, per=0.3), act, kind, arrivals)) as address:
        first, second = await call_from_go(address, GO, kind=kind, calls=2, service_config=patient(5))
    assert [(call.code, call.replies) for call in (first, second)] == [("OK", [b"run 1"]), ("OK", [b"run 2"])]
    assert arrivals.attempts == 3  # the first call's one, and the second's two
    assert first.elapsed + second.elapsed > 0.28
    assert second.elapsed < 3  # not the backoff of five seconds: the server's own word
    assert act.runs == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_grpc_go_does_not_retry_what_the_server_calls_useless(kind: str) -> None:
    act, arrivals = Counts(), Arrivals()
    async with served(limited(Quota(1, per=3600), act, kind, arrivals)) as address:
        _, denied = await call_from_go(address, GO, kind=kind, calls=2, service_config=patient(0.001))
    assert (denied.code, denied.replies) == ("ResourceExhausted", [])
    assert denied.trailers["grpc-retry-pushback-ms"] == ["-1"]
    assert (arrivals.attempts, act.runs) == (2, 1)


async def test_grpc_go_sends_a_payment_again_and_receives_the_first_reply(demo: Launched) -> None:
    who = [("x-api-key", "go-replay"), ("x-correlation-id", "go-replay"), ("idempotency-key", "order-1")]
    first, again = await call_from_go(demo.grpc, PAY, EUROS.SerializeToString(), calls=2, headers=who)
    assert (first.code, again.code) == ("OK", "OK")
    assert first.replies == again.replies
    assert pb.Payment.FromString(first.replies[0]).amount == 100
    assert "x-idempotent-replayed" not in first.trailers
    assert again.trailers["x-idempotent-replayed"] == ["true"]
    assert again.trailers["x-correlation-id"] == ["go-replay"]
    assert first.trailers["x-request-id"] != again.trailers["x-request-id"]
    assert taken(demo, "go-replay") == 1


async def test_go_and_python_share_a_key(demo: Launched) -> None:
    who = [("x-api-key", "go-python"), ("x-correlation-id", "go-python"), ("idempotency-key", "order-1")]
    (from_go,) = await call_from_go(demo.grpc, PAY, EUROS.SerializeToString(), headers=who)
    async with grpc.aio.insecure_channel(demo.grpc) as channel:
        stub: Any = channel.unary_unary(PAY)
        call = stub(EUROS.SerializeToString(), metadata=who, timeout=20)
        assert [await call] == from_go.replies
        assert ("x-idempotent-replayed", "true") in list(await call.trailing_metadata())
    assert taken(demo, "go-python") == 1


async def test_go_clients_that_race_with_one_key_both_have_the_one_payment(demo: Launched) -> None:
    who = [("x-api-key", "go-race"), ("x-correlation-id", "go-race"), ("idempotency-key", "order-1")]
    pay = (demo.grpc, PAY, EUROS.SerializeToString())
    retry = patient(0.2, PAY, grpc.StatusCode.ABORTED)
    racers = [call_from_go(*pay, headers=who, service_config=retry) for _ in range(2)]
    (one,), (other,) = await asyncio.gather(*racers)
    assert (one.code, other.code) == ("OK", "OK")
    assert one.replies == other.replies
    assert taken(demo, "go-race") == 1
