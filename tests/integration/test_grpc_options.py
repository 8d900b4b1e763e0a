"""What a .proto declares beside an rpc holds: as a decorator of its handler would, or the server does not start."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from fastapi import FastAPI
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto, MethodOptions
from google.protobuf.wrappers_pb2 import StringValue

from grpc_interceptors import ResilienceInterceptor
from http_middleware import install
from resilience import (
    ConfigurationError,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    Policy,
    RateLimitPolicy,
    Selective,
    idempotent,
    rate_limit,
)
from resilience.testing import FaultyStore, ManualClock
from resilience.v1 import options_pb2
from tests.integration.grpc_world import KINDS, Pair, Told, ask, connected, generic, start, told
from tests.integration.http_driver import connect

StatusCode = grpc.StatusCode
KEY: Pair = ("idempotency-key", "key-1")
REPLAYED = "x-idempotent-replayed"
SENT = StringValue(value="one").SerializeToString()
EXTENSION: Any = options_pb2.policy
_files = count()


class Rpc:
    """A method of a service of its own, whose .proto holds ``text`` as its option, and a handler that counts.

    Args:
        text: what stands between the braces of the option; None for a method without one.
        kind: the kind of method.
        level: its ``idempotency_level``.
        raw: options as bytes, in place of ``text``.
    """

    def __init__(
        self,
        text: str | None,
        kind: str = "unary_unary",
        level: "MethodOptions.IdempotencyLevel.ValueType" = MethodOptions.IDEMPOTENCY_UNKNOWN,
        raw: bytes = b"",
    ) -> None:
        self.kind = kind
        self.runs = 0
        package = f"test.options{next(_files)}"
        file = FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        file.dependency.append("google/protobuf/wrappers.proto")
        message = ".google.protobuf.StringValue"
        method = file.service.add(name="Things").method.add(name="Go", input_type=message, output_type=message)
        method.client_streaming, method.server_streaming = kind.startswith("stream"), kind.endswith("stream")
        if level:
            method.options.idempotency_level = level
        if text is not None:
            method.options.Extensions[EXTENSION].SetInParent()
            text_format.Parse(text, method.options.Extensions[EXTENSION])
        method.options.MergeFromString(raw)
        self.path = f"/{package}.Things/Go"
        self.module = ModuleType(f"{package}_pb2")
        descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
        self.module.__dict__["DESCRIPTOR"] = descriptor_pool.Default().FindFileByName(file.name)

    def imported(self, patch: pytest.MonkeyPatch) -> "Rpc":
        """Stand among the imported modules, as generated code does."""
        patch.setitem(sys.modules, self.module.__name__, self.module)
        return self

    async def once(self, _request: Any, _context: Any) -> StringValue:
        self.runs += 1
        return StringValue(value=f"run {self.runs}")

    async def many(self, _request: Any, _context: Any) -> AsyncIterator[StringValue]:
        self.runs += 1
        yield StringValue(value=f"run {self.runs}")

    def handlers(self, function: Any = None) -> dict[str, Any]:
        make: Any = getattr(grpc, f"{self.kind}_rpc_method_handler")
        function = function or (self.many if self.kind.endswith("stream") else self.once)
        return {self.path: make(function, StringValue.FromString, StringValue.SerializeToString)}


@asynccontextmanager
async def serving(
    rpc: Rpc, function: Any = None, *, pipeline: Pipeline | None = None, inside: Any = ()
) -> AsyncIterator[grpc.aio.Channel]:
    clocked = pipeline or Pipeline(store=MemoryStore(clock=ManualClock()))
    server = grpc.aio.server(interceptors=[ResilienceInterceptor(clocked), *inside])
    server.add_generic_rpc_handlers(generic(rpc.handlers(function)))
    async with connected(server) as channel:
        yield channel


async def go(channel: grpc.aio.Channel, rpc: Rpc, *metadata: Pair) -> Told:
    return await ask(channel, rpc.path, rpc.kind, *metadata, send=[SENT])


async def over(channel: grpc.aio.Channel, rpc: Rpc) -> Told:
    # A refusal needs no request; one that is on its way while the refusal arrives may hide it from this client.
    return await told(start(channel, rpc.path, rpc.kind, send=[SENT]))


# -- limits


@pytest.mark.parametrize("kind", KINDS)
async def test_a_method_whose_option_limits_it_is_refused_before_it_runs(kind: str) -> None:
    rpc = Rpc('rate_limit { quota: "1/20s" }', kind)
    async with serving(rpc) as channel:
        first, second = await go(channel, rpc), await over(channel, rpc)
    assert (first.code, first.get("ratelimit")) == (StatusCode.OK, f'"1/20s {rpc.path}";r=0;t=20')
    assert (second.code, second.details) == (StatusCode.RESOURCE_EXHAUSTED, "Too many requests")
    assert second.get("grpc-retry-pushback-ms") == "20001"
    assert rpc.runs == 1


async def test_every_quota_holds_and_a_call_takes_its_cost_of_each() -> None:
    rpc = Rpc('rate_limit { quota: "10/second and 5/hour" cost: 2 } rate_limit { quota: "100/day" cost: 0 }')
    async with serving(rpc) as channel:
        ends = [await go(channel, rpc) for _ in range(3)]
    assert [end.code for end in ends] == [StatusCode.OK, StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]
    assert ends[1].get("ratelimit") == (
        f'"10/second {rpc.path}";r=6;t=1, "5/hour {rpc.path}";r=1;t=3600, "100/day {rpc.path}";r=100;t=0'
    )


@pytest.mark.parametrize(
    ("key", "other"),
    [("", StatusCode.OK), ("key: ADDRESS", StatusCode.RESOURCE_EXHAUSTED), ("key: EVERYONE", None)],
    ids=["caller", "address", "everyone"],
)
async def test_a_limit_counts_for_whom_its_key_says(key: str, other: StatusCode | None) -> None:
    rpc = Rpc(f'rate_limit {{ quota: "1/minute" {key} }}')
    async with serving(rpc) as channel:
        ends = [await go(channel, rpc, ("x-api-key", who)) for who in ("me", "me", "you")]
    assert [end.code for end in ends] == [
        StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED, other or StatusCode.RESOURCE_EXHAUSTED,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("on_outage", "codes"),
    [
        ("", [StatusCode.OK, StatusCode.OK]),
        ("on_outage: OPEN", [StatusCode.OK, StatusCode.OK]),
        ("on_outage: CLOSED", [StatusCode.UNAVAILABLE, StatusCode.UNAVAILABLE]),
        ("on_outage: LOCAL", [StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]),
    ],
)
async def test_while_the_store_is_gone_a_limit_does_what_its_option_says(
    on_outage: str, codes: list[StatusCode]
) -> None:
    rpc = Rpc(f'rate_limit {{ quota: "1/minute" {on_outage} }}')
    store = FaultyStore(MemoryStore())
    store.down = True
    async with serving(rpc, pipeline=Pipeline(store=store)) as channel:
        assert [(await go(channel, rpc)).code for _ in range(2)] == codes


async def test_a_limit_of_the_pipeline_and_one_of_an_option_both_hold() -> None:
    rpc = Rpc('rate_limit { quota: "2/second" }')
    clock = ManualClock()
    pipeline = Pipeline([RateLimitPolicy(MemoryStore(clock=clock), "3/minute")])
    async with serving(rpc, pipeline=pipeline) as channel:
        burst = [(await go(channel, rpc)).code for _ in range(3)]
        clock.advance(61)
        slow = []
        for _ in range(4):
            slow.append((await go(channel, rpc)).code)
            clock.advance(2)
    assert burst == [StatusCode.OK, StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]
    assert slow == [StatusCode.OK, StatusCode.OK, StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED]


async def test_an_interceptor_that_makes_new_handlers_for_each_call_starts_no_new_count() -> None:
    class Remakes(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            inner = await continuation(handler_call_details)

            async def once(request: Any, context: Any) -> Any:
                return await inner.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(once, inner.request_deserializer, inner.response_serializer)

    rpc = Rpc('rate_limit { quota: "2/minute" } idempotency {}')
    pipeline = Pipeline()
    async with serving(rpc, pipeline=pipeline, inside=[Remakes()]) as channel:
        codes = [(await go(channel, rpc)).code for _ in range(4)]
    assert codes == [StatusCode.OK] * 2 + [StatusCode.RESOURCE_EXHAUSTED] * 2
    assert len(pipeline._late) == 2


# -- keys


async def test_a_method_whose_option_requires_a_key_refuses_calls_without_one_and_replays_the_rest() -> None:
    rpc = Rpc("idempotency { required: true ttl { seconds: 60 } lease { seconds: 1 nanos: 500000000 } }")
    async with serving(rpc) as channel:
        missing = await go(channel, rpc)
        first, second = await go(channel, rpc, KEY), await go(channel, rpc, KEY)
    assert (missing.code, missing.details) == (
        StatusCode.INVALID_ARGUMENT,
        "This operation needs an Idempotency-Key",
    )
    assert (first.get(REPLAYED), second.get(REPLAYED)) == (None, "true")
    assert (first.replies, rpc.runs) == (second.replies, 1)


@pytest.mark.parametrize("in_progress", ["", "in_progress: WAIT", "in_progress: REJECT"])
async def test_a_duplicate_of_a_running_call_does_what_the_option_says(in_progress: str) -> None:
    rpc, entered, gate = Rpc(f"idempotency {{ {in_progress} }}"), asyncio.Event(), asyncio.Event()

    async def handle(request: StringValue, context: Any) -> StringValue:
        entered.set()
        await gate.wait()
        return await rpc.once(request, context)

    async with serving(rpc, handle, pipeline=Pipeline()) as channel:
        first = asyncio.create_task(go(channel, rpc, KEY))
        await entered.wait()
        if in_progress.endswith("REJECT"):
            assert (await go(channel, rpc, KEY)).code is StatusCode.ABORTED
            gate.set()
        else:
            twin = asyncio.create_task(go(channel, rpc, KEY))
            gate.set()
            assert (await twin).replies == (await first).replies
        assert (await first).code is StatusCode.OK
    assert rpc.runs == 1


async def test_a_reply_is_kept_as_long_as_the_option_says() -> None:
    rpc, clock = Rpc("idempotency { ttl { seconds: 60 } }"), ManualClock()
    async with serving(rpc, pipeline=Pipeline(store=MemoryStore(clock=clock))) as channel:
        await go(channel, rpc, KEY)
        clock.advance(59)
        replay = await go(channel, rpc, KEY)
        clock.advance(2)
        again = await go(channel, rpc, KEY)
    assert (replay.get(REPLAYED), again.get(REPLAYED), rpc.runs) == ("true", None, 2)


async def test_a_required_key_is_required_although_the_pipeline_does_not_and_is_claimed_once() -> None:
    rpc, store = Rpc("idempotency { required: true }"), MemoryStore()
    async with serving(rpc, pipeline=Pipeline([IdempotencyPolicy(store)])) as channel:
        missing = await go(channel, rpc)
        first, second = await go(channel, rpc, KEY), await go(channel, rpc, KEY)
    assert missing.code is StatusCode.INVALID_ARGUMENT
    assert (first.code, second.get(REPLAYED), rpc.runs) == (StatusCode.OK, "true", 1)
    assert len(store._records) == 1


async def test_an_option_and_an_endpoint_share_what_they_call_by_one_name() -> None:
    rpc = Rpc('rate_limit { quota: "3/minute" name: "shared" } idempotency { operation: "pay" }')
    pipeline, app, runs = Pipeline(store=MemoryStore(clock=ManualClock())), FastAPI(), []

    @app.post("/payments")
    @rate_limit("3/minute", name="shared")
    @idempotent(operation="pay")
    async def create_payment() -> str:
        runs.append("http")
        return "paid"

    install(app, pipeline)
    async with serving(rpc, pipeline=pipeline) as channel, connect(app) as http:
        headers = {"idempotency-key": "key-1", "x-api-key": "me"}
        over_http = await http.post("/payments", headers=headers)
        over_grpc = await go(channel, rpc, KEY, ("x-api-key", "me"))
    assert (over_http.status_code, over_grpc.code) == (200, StatusCode.ALREADY_EXISTS)
    assert over_grpc.get("ratelimit") == '"shared";r=1;t=60'
    assert (runs, rpc.runs) == (["http"], 0)


# -- precedence


async def test_a_decorators_limit_wins_over_the_options_whose_key_still_holds() -> None:
    rpc = Rpc('rate_limit { quota: "1/hour" } idempotency { required: true }')

    @rate_limit("3/minute")
    async def handle(_request: StringValue, _context: Any) -> StringValue:
        rpc.runs += 1
        return StringValue()

    async with serving(rpc, handle) as channel:
        missing = await go(channel, rpc)
        first, second = await go(channel, rpc, KEY), await go(channel, rpc, KEY)
        over_limit = await go(channel, rpc, KEY)
    assert (missing.code, over_limit.code) == (StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED)
    assert (first.code, first.get("ratelimit")) == (StatusCode.OK, f'"3/minute {rpc.path}";r=1;t=60')
    assert (second.get(REPLAYED), rpc.runs) == ("true", 1)


async def test_a_decorators_key_wins_over_the_options_whose_limit_still_holds() -> None:
    rpc = Rpc('rate_limit { quota: "3/minute" } idempotency { required: true operation: "other" }')
    store = MemoryStore(clock=ManualClock())

    @idempotent()
    async def handle(_request: StringValue, _context: Any) -> StringValue:
        rpc.runs += 1
        return StringValue()

    async with serving(rpc, handle, pipeline=Pipeline(store=store)) as channel:
        plain = await go(channel, rpc)
        first, second = await go(channel, rpc, KEY), await go(channel, rpc, KEY)
        over_limit = await go(channel, rpc, ("idempotency-key", "key-2"))
    assert (plain.code, over_limit.code) == (StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED)
    assert (first.get(REPLAYED), second.get(REPLAYED), rpc.runs) == (None, "true", 2)
    assert len(store._records) == 1


async def test_where_decorators_say_both_an_option_says_nothing() -> None:
    rpc = Rpc('rate_limit { quota: "1/hour" } idempotency { required: true }')

    @rate_limit("3/minute")
    @idempotent()
    async def handle(_request: StringValue, _context: Any) -> StringValue:
        return StringValue()

    async with serving(rpc, handle) as channel:
        ends = [await go(channel, rpc) for _ in range(3)]
    assert [end.code for end in ends] == [StatusCode.OK] * 3
    assert ends[2].get("ratelimit") == f'"3/minute {rpc.path}";r=0;t=60'


BY_THE_MINUTE = "idempotency { ttl { seconds: 60 } in_progress: REJECT }"


def minutely(rpc: Rpc) -> Any:
    """Return the handler of a method, with a decorator that says the same."""

    @idempotent(ttl=60, in_progress="reject")
    async def handle(request: StringValue, context: Any) -> StringValue:
        return await rpc.once(request, context)

    return handle


def everywhere(policy: IdempotencyPolicy, _rpc: Rpc) -> Policy:
    return policy


def there_only(policy: IdempotencyPolicy, rpc: Rpc) -> Policy:
    return Selective(policy, [rpc.path])


each_source = pytest.mark.parametrize("text", [BY_THE_MINUTE, None], ids=["option", "decorator"])
each_extent = pytest.mark.parametrize("extent", [everywhere, there_only])


@each_source
@each_extent
async def test_how_long_a_reply_is_kept_is_the_specific_policys_to_say(text: str | None, extent: Any) -> None:
    rpc, clock = Rpc(text), ManualClock()
    store = MemoryStore(clock=clock)
    pipeline = Pipeline([extent(IdempotencyPolicy(store), rpc)])
    async with serving(rpc, None if text else minutely(rpc), pipeline=pipeline) as channel:
        first = await go(channel, rpc, KEY)
        replay = await go(channel, rpc, KEY)
        clock.advance(61)
        again = await go(channel, rpc, KEY)
    assert (first.replies, replay.get(REPLAYED)) == (replay.replies, "true")
    assert (again.get(REPLAYED), rpc.runs) == (None, 2)


@each_source
async def test_what_a_duplicate_meets_is_the_specific_policys_to_say(text: str | None) -> None:
    rpc, entered, gate = Rpc(text), asyncio.Event(), asyncio.Event()

    async def once(_request: Any, _context: Any) -> StringValue:
        entered.set()
        await gate.wait()
        return StringValue()

    rpc.once = once  # type: ignore[method-assign]
    pipeline = Pipeline([IdempotencyPolicy(MemoryStore(), in_progress="wait")])
    async with serving(rpc, None if text else minutely(rpc), pipeline=pipeline) as channel:
        first = asyncio.create_task(go(channel, rpc, KEY))
        await entered.wait()
        twin = await go(channel, rpc, KEY)
        gate.set()
        assert (await first).code is StatusCode.OK
    assert twin.code is StatusCode.ABORTED


@each_source
@each_extent
async def test_a_key_that_the_pipeline_requires_stays_required(text: str | None, extent: Any) -> None:
    rpc = Rpc(text)
    pipeline = Pipeline([extent(IdempotencyPolicy(MemoryStore(), required=True), rpc)])
    async with serving(rpc, None if text else minutely(rpc), pipeline=pipeline) as channel:
        missing, given = await go(channel, rpc), await go(channel, rpc, KEY)
    assert (missing.code, given.code, rpc.runs) == (StatusCode.INVALID_ARGUMENT, StatusCode.OK, 1)


async def test_a_key_that_the_pipeline_requires_of_other_methods_is_not_required() -> None:
    rpc = Rpc(BY_THE_MINUTE)
    other = Rpc(None)
    keyed = Selective(IdempotencyPolicy(MemoryStore(), required=True), [other.path])
    async with serving(rpc, pipeline=Pipeline([keyed])) as channel:
        assert (await go(channel, rpc)).code is StatusCode.OK


@each_source
async def test_the_records_stay_in_the_store_of_the_pipelines_policy(text: str | None) -> None:
    rpc, counts, records = Rpc(text), MemoryStore(), MemoryStore()
    pipeline = Pipeline([RateLimitPolicy(counts, "100/minute"), IdempotencyPolicy(records)])
    async with serving(rpc, None if text else minutely(rpc), pipeline=pipeline) as channel:
        await go(channel, rpc, KEY)
        assert (await go(channel, rpc, KEY)).get(REPLAYED) == "true"
    assert (len(counts._records), len(records._records)) == (0, 1)


# -- options that can't be honoured

NO_SIDE_EFFECTS = MethodOptions.NO_SIDE_EFFECTS
BAD = {
    "no quota": (Rpc("rate_limit {}"), r"rate_limit: '' is not a quota"),
    "no such quota": (Rpc('rate_limit { quota: "5 a fortnight" }'), "rate_limit: '5 a fortnight' is not a quota"),
    "a quota of nothing": (Rpc('rate_limit { quota: "0/minute" }'), "rate_limit: A quota's limit must be"),
    "a bad name": (Rpc('rate_limit { quota: "5/minute" name: "\\"" }'), "rate_limit: '\"' is not a rule's name"),
    "one name for two quotas": (
        Rpc('rate_limit { quota: "1/second and 5/minute" name: "a" }'),
        "rate_limit: Several quotas can't share the name 'a'",
    ),
    "one limit twice": (
        Rpc('rate_limit { quota: "5/minute" } rate_limit { quota: "5/minute" key: ADDRESS }'),
        "rate_limit: A rate limit needs at least one rule, each with a name of its own",
    ),
    "a key of tomorrow": (Rpc('rate_limit { quota: "5/minute" key: 9 }'), "rate_limit: 9 is no key"),
    "an outage of tomorrow": (
        Rpc('rate_limit { quota: "5/minute" on_outage: 9 }'),
        "rate_limit: 9 is no on_outage",
    ),
    "a takeover of tomorrow": (Rpc("idempotency { takeover: 9 }"), "idempotency: 9 is no takeover"),
    "a way to wait of tomorrow": (Rpc("idempotency { in_progress: 9 }"), "idempotency: 9 is no in_progress"),
    "a policy of tomorrow": (Rpc(None, raw=b"\xea\xa8\x25\x02\x78\x01"), r"policy\): it says more than this version"),
    "a limit of tomorrow": (Rpc(None, raw=b"\xea\xa8\x25\x04\x0a\x02\x78\x01"), "rate_limit: it says more than this"),
    "a key on a request stream": (Rpc("idempotency { required: true }", "stream_unary"), "idempotency: .* unary"),
    "a key on a reply stream": (Rpc("idempotency { required: true }", "unary_stream"), "idempotency: .* unary"),
    "a key on two streams": (Rpc("idempotency { required: true }", "stream_stream"), "idempotency: .* unary"),
    "an optional key on a stream": (Rpc("idempotency {}", "stream_stream"), "idempotency: .* unary"),
    "a key on a safe method": (
        Rpc("idempotency { required: true }", level=NO_SIDE_EFFECTS),
        "idempotency: .* NO_SIDE_EFFECTS, and such calls take no key",
    ),
    "a lease over the ttl": (
        Rpc("idempotency { ttl { seconds: 5 } lease { seconds: 6 } }"),
        r"idempotency: .* 1 second to the ttl \(5\), not 6",
    ),
    "a ttl under the lease that is not told": (Rpc("idempotency { ttl { seconds: 5 } }"), r"the ttl \(5\), not 30"),
    "a negative lease": (Rpc("idempotency { lease { seconds: -1 } }"), "idempotency: .* not -1"),
}
each_bad = pytest.mark.parametrize(("rpc", "why"), BAD.values(), ids=BAD.keys())


@each_bad
def test_an_option_that_can_not_be_honoured_stops_the_server_from_starting(
    rpc: Rpc, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rpc.imported(monkeypatch)
    with pytest.raises(ConfigurationError, match=why) as refused:
        ResilienceInterceptor(Pipeline())
    assert str(refused.value).startswith(f"{rpc.path} can't be held to its option (resilience.v1.policy)")
    assert str(refused.value).endswith("Correct the .proto, and generate its code anew.")


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_of_a_method_imported_later_are_refused_where_its_option_can_not_be_honoured(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rpc = Rpc('rate_limit { quota: "plenty" }', kind)
    async with serving(rpc) as channel:
        ends = [await over(channel, rpc) for _ in range(2)]
    assert [(end.code, end.details) for end in ends] == [(StatusCode.INTERNAL, "Internal error")] * 2
    assert ends[0].get("x-request-id")
    errors = [record for record in caplog.records if record.name == "resilience" and record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert f"{rpc.path} can't be held to its option (resilience.v1.policy).rate_limit: 'plenty'" in caplog.text
    assert rpc.runs == 0


def test_what_is_right_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    Rpc('rate_limit { quota: "5/minute" } idempotency {}').imported(monkeypatch)
    Rpc('rate_limit { quota: "5/minute" }', "stream_stream", NO_SIDE_EFFECTS).imported(monkeypatch)
    Rpc("idempotency { required: true }", level=MethodOptions.IDEMPOTENT).imported(monkeypatch)
    ResilienceInterceptor(Pipeline())


# -- no option, and options read by somebody else


@pytest.mark.parametrize("text", [None, ""], ids=["no option", "an empty one"])
async def test_a_method_without_an_option_is_untouched(text: str | None) -> None:
    rpc, pipeline = Rpc(text), Pipeline()
    async with serving(rpc, pipeline=pipeline) as channel:
        ends = [await go(channel, rpc, KEY) for _ in range(3)]
    assert [(end.code, end.get("ratelimit"), end.get(REPLAYED)) for end in ends] == [(StatusCode.OK, None, None)] * 3
    assert rpc.runs == 3
    assert pipeline._late == {}


READ_EARLY = """
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto

file = FileDescriptorProto(name="early.proto", package="early", dependency=["google/protobuf/wrappers.proto"])
message = ".google.protobuf.StringValue"
method = file.service.add(name="Things").method.add(name="Go", input_type=message, output_type=message)
method.options.MergeFromString(bytes.fromhex("eaa8250c0a0a0a08") + b"1/minute")
from google.protobuf import wrappers_pb2
pool = descriptor_pool.Default()
pool.AddSerializedFile(file.SerializeToString())
assert not pool.FindMethodByName("early.Things.Go").GetOptions().ListFields()

from grpc_interceptors.options import MethodPolicies
known = MethodPolicies().of(pool.FindMethodByName("early.Things.Go"))
assert known.limits[0]("any").quota.name == "1/minute", known
"""


def test_an_option_that_somebody_read_before_it_was_known_holds() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", READ_EARLY],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
