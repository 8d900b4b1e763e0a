"""OpenTelemetry's and grpc-interceptor's interceptors beside ours: best before it, so that ours is next to the handler.

Ours last, every style works that the other one can take at all. Ours first, handlers that are plain functions meet the
other interceptor, and neither of the two awaits those.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_interceptor import AsyncServerInterceptor
from opentelemetry import trace
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from grpc_interceptors import ResilienceInterceptor, add_health
from resilience import (
    HealthChecker,
    IdempotencyPolicy,
    MemoryStore,
    Pipeline,
    RateLimitPolicy,
    get_correlation_id,
)
from tests.integration.grpc_world import (
    GO,
    SECRET,
    STYLES,
    SYNC_STYLES,
    Pair,
    Style,
    SyncStyle,
    Told,
    Waits,
    Witness,
    aborts,
    ask,
    connected,
    crashes,
    generic,
    leaks,
    ok,
    sets_code,
    start,
)

StatusCode = grpc.StatusCode
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT: Pair = ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01")
KEY: Pair = ("idempotency-key", "key-1")

WRITERS = ("unary_stream_writer", "stream_stream_reader_writer")
TAKEN_FOR_GENERATORS = [("opentelemetry", style) for style in WRITERS]
"""What OpenTelemetry iterates though it is a coroutine, with us or without."""

ENDS: dict[str, tuple[Callable[[Any], Awaitable[bytes]], StatusCode, str]] = {
    "ok": (ok, StatusCode.OK, ""),
    "aborts": (aborts, StatusCode.FAILED_PRECONDITION, "Not yet"),
    "crashes": (crashes, StatusCode.INTERNAL, "Internal error"),
    "sets_code": (sets_code, StatusCode.NOT_FOUND, "Nothing there"),
    "leaks": (leaks, StatusCode.INTERNAL, "Internal error"),
}


def sync_ok(_context: Any) -> bytes:
    return b"done"


def sync_aborts(context: Any) -> bytes:
    context.abort(StatusCode.FAILED_PRECONDITION, "Not yet")
    return b"never"


def sync_crashes(_context: Any) -> bytes:
    raise ValueError(SECRET)


SYNC_ENDS = {"ok": sync_ok, "aborts": sync_aborts, "crashes": sync_crashes}


class PassingOn(AsyncServerInterceptor):
    """grpc-interceptor's base, which hands every call on."""

    async def intercept(
        self, method: Callable[..., Any], request_or_iterator: Any, context: Any, method_name: str
    ) -> Any:
        return await super().intercept(method, request_or_iterator, context, method_name)


@dataclass
class Other:
    """Somebody else's interceptor, and the spans that it made if it makes any."""

    interceptor: Any
    spans: InMemorySpanExporter

    def finished(self) -> tuple[ReadableSpan, ...]:
        return self.spans.get_finished_spans()

    def serving(
        self, handler: Any, pipeline: Pipeline, *, ours: str = "last", checker: HealthChecker | None = None
    ) -> AbstractAsyncContextManager[grpc.aio.Channel]:
        """Serve ``handler`` behind both interceptors; ours is ``"first"`` or ``"last"`` in the list."""
        guard = ResilienceInterceptor(pipeline)
        server = grpc.aio.server(
            interceptors=[self.interceptor, guard] if ours == "last" else [guard, self.interceptor]
        )
        server.add_generic_rpc_handlers(generic({GO: handler}))
        if checker is not None:
            add_health(server, checker)
        return connected(server)


def opentelemetry() -> Other:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    make: Callable[..., Any] = aio_server_interceptor  # which has no types
    return Other(make(tracer_provider=provider), spans)


def grpc_interceptor() -> Other:
    return Other(PassingOn(), InMemorySpanExporter())


OTHERS = {"opentelemetry": opentelemetry, "grpc_interceptor": grpc_interceptor}
TAKEN = [(other, style) for other in OTHERS for style in STYLES if (other, style) not in TAKEN_FOR_GENERATORS]
EVERY_STYLE: dict[str, Style | SyncStyle] = {
    **{name: style for name, style in STYLES.items() if name not in WRITERS},
    **{f"plain_{name}": style for name, style in SYNC_STYLES.items()},
}
each_other_and_style = pytest.mark.parametrize(("other", "style"), TAKEN, indirect=["other"])
each_order = pytest.mark.parametrize("ours", ["last", "first"])


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest) -> Other:
    return OTHERS[request.param]()


@pytest.fixture
def otel() -> Other:
    return opentelemetry()


def limited(rate: str = "100/minute") -> Pipeline:
    return Pipeline([RateLimitPolicy(MemoryStore(), rate)])


def assert_ended(end: Told, code: StatusCode, text: str) -> None:
    assert (end.code, end.details) == (code, text)
    assert SECRET not in repr(end)
    assert end.get("x-request-id")
    assert (end.get("x-correlation-id"), end.get("x-ratelimit-remaining")) == (TRACE, "99")
    if code is StatusCode.OK:
        assert end.replies == [b"done"]


@each_order
@pytest.mark.parametrize("end", ENDS)
@each_other_and_style
async def test_each_end_of_an_async_handler_is_the_same_beside_another_interceptor(
    other: Other, style: str, end: str, ours: str
) -> None:
    act, code, text = ENDS[end]
    async with other.serving(STYLES[style].make(act), limited(), ours=ours) as channel:
        assert_ended(await ask(channel, GO, STYLES[style].kind, TRACEPARENT), code, text)


@pytest.mark.parametrize("end", SYNC_ENDS)
@pytest.mark.parametrize("style", SYNC_STYLES.values(), ids=SYNC_STYLES)
async def test_plain_functions_work_behind_another_interceptor_if_ours_is_last(
    other: Other, style: SyncStyle, end: str
) -> None:
    _, code, text = ENDS[end]
    async with other.serving(style.make(SYNC_ENDS[end]), limited()) as channel:
        assert_ended(await ask(channel, GO, style.kind, TRACEPARENT), code, text)


@pytest.mark.parametrize("style", SYNC_STYLES.values(), ids=SYNC_STYLES)
async def test_plain_functions_break_in_another_interceptor_if_ours_is_first_and_the_reason_stays_here(
    other: Other, style: SyncStyle
) -> None:
    async with other.serving(style.make(sync_ok), limited(), ours="first") as channel:
        assert_ended(await ask(channel, GO, style.kind, TRACEPARENT), StatusCode.INTERNAL, "Internal error")


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("style", WRITERS)
async def test_opentelemetry_breaks_writers_without_us_too(otel: Other, style: str) -> None:
    server = grpc.aio.server(interceptors=[otel.interceptor])
    server.add_generic_rpc_handlers(generic({GO: STYLES[style].make(ok)}))
    async with connected(server) as channel:
        end = await ask(channel, GO, STYLES[style].kind)
    assert end.code is StatusCode.UNKNOWN


@each_order
async def test_a_refused_call_is_refused_whole_beside_another_interceptor(other: Other, ours: str) -> None:
    async with other.serving(STYLES["unary_unary"].make(ok), limited("1/hour"), ours=ours) as channel:
        await ask(channel)
        end = await ask(channel)
    assert end.code is StatusCode.RESOURCE_EXHAUSTED
    assert end.get("x-request-id")
    assert end.get("grpc-retry-pushback-ms")
    assert len(end.get_all("grpc-status-details-bin")) == 1


@each_order
async def test_a_replay_is_byte_for_byte_beside_another_interceptor(other: Other, ours: str) -> None:
    runs: list[int] = []

    async def act(_context: Any) -> bytes:
        runs.append(1)
        return b"run %d" % len(runs)

    pipeline = Pipeline([IdempotencyPolicy(MemoryStore())])
    async with other.serving(STYLES["unary_unary"].make(act), pipeline, ours=ours) as channel:
        first = await ask(channel, GO, "unary_unary", KEY)
        again = await ask(channel, GO, "unary_unary", KEY)
    assert first.replies == again.replies == [b"run 1"]
    assert again.get("x-idempotent-replayed") == "true"


@each_order
@each_other_and_style
async def test_a_client_that_leaves_is_heard_of_once_beside_another_interceptor(
    other: Other, style: str, ours: str
) -> None:
    act, witness, kind = Waits(), Witness(), STYLES[style].kind
    async with other.serving(STYLES[style].make(act), Pipeline([witness]), ours=ours) as channel:
        call = start(channel, GO, kind)
        if kind.startswith("stream_"):
            await call.done_writing()
        await act.entered.wait()
        call.cancel()
        await act.cut.wait()
        assert (await witness.outcomes.get()).ended == "cancelled"
    assert witness.outcomes.empty()


@each_order
async def test_a_watch_of_health_tells_the_drain_beside_another_interceptor(other: Other, ours: str) -> None:
    checker, response = HealthChecker(), health_pb2.HealthCheckResponse
    async with other.serving(STYLES["unary_unary"].make(ok), limited(), ours=ours, checker=checker) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == response.SERVING
        checker.drain()
        assert (await watch.read()).status == response.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


# -- OpenTelemetry's trace and ours


@pytest.mark.parametrize(
    ("given", "correlation_id"),
    [((TRACEPARENT,), TRACE), ((TRACEPARENT, ("x-correlation-id", "mine")), "mine")],
    ids=["trace only", "an id of its own"],
)
async def test_a_callers_trace_id_is_the_correlation_id_unless_it_sent_one(
    otel: Other, given: tuple[Pair, ...], correlation_id: str
) -> None:
    async with otel.serving(STYLES["unary_unary"].make(ok), limited()) as channel:
        end = await ask(channel, GO, "unary_unary", *given)
    (span,) = otel.finished()
    assert end.get("x-correlation-id") == correlation_id
    assert format(span.context.trace_id, "032x") == TRACE


@pytest.mark.parametrize("style", EVERY_STYLE.values(), ids=EVERY_STYLE)
async def test_a_handler_runs_in_the_span_and_with_the_ids_of_its_call(otel: Other, style: Style | SyncStyle) -> None:
    seen: list[tuple[str, str | None]] = []

    def note(_context: Any) -> bytes:
        span = trace.get_current_span().get_span_context()
        seen.append((format(span.trace_id, "032x"), get_correlation_id()))
        return b"done"

    async def act(context: Any) -> bytes:
        return note(context)

    handler = style.make(act) if isinstance(style, Style) else style.make(note)
    async with otel.serving(handler, limited()) as channel:
        await ask(channel, GO, style.kind, TRACEPARENT)
    assert seen == [(TRACE, TRACE)]


async def test_a_refused_call_has_a_span_with_its_code(otel: Other) -> None:
    async with otel.serving(STYLES["unary_unary"].make(ok), limited("1/hour")) as channel:
        await ask(channel)
        await ask(channel)
    codes = [(span.attributes or {})["rpc.grpc.status_code"] for span in otel.finished()]
    assert codes == [0, StatusCode.RESOURCE_EXHAUSTED.value[0]]
