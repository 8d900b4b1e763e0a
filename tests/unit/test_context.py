import asyncio
import json
import pickle
import sys
from asyncio import to_thread
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from contextvars import copy_context as copy_interpreter_context
from functools import partial
from threading import Thread
from typing import Any

import pytest

from resilience import Pipeline, RequestContextPolicy, wire
from resilience.background import bind_context
from resilience.call import Call
from resilience.context import (
    ContextSnapshot,
    RequestContext,
    add_request_context,
    close_context,
    copy_context,
    get_correlation_id,
    get_request_context,
    get_request_id,
    get_tracing_headers,
    open_context,
    restore_context,
    set_context_user,
)
from resilience.testing import ManualClock
from tests.support.calls import Sent

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def full() -> RequestContext:
    return RequestContext(
        "req_1",
        "corr_1",
        parent_request_id="req_0",
        user_id="ann",
        tenant_id="acme",
        protocol="http",
        traceparent=TRACEPARENT,
        tracestate="a=1",
    )


@pytest.fixture
def opened() -> Iterator[RequestContext]:
    context = full()
    token = open_context(context)
    yield context
    close_context(token)


def test_outside_of_a_call_everything_answers_and_nothing_is_there() -> None:
    assert not get_request_context()
    assert get_request_id() is None
    assert get_correlation_id() is None
    assert get_tracing_headers() == {}
    assert add_request_context(None, "info", {"event": "x"}) == {"event": "x"}
    assert copy_context() == ContextSnapshot(None, None, None, None, None, None, None, None)


def test_what_is_changed_outside_of_a_call_is_changed_for_nobody() -> None:
    get_request_context().set_user("ann")
    assert get_request_context().user_id is None


def test_inside_of_a_call_its_ids_are_everywhere(opened: RequestContext) -> None:
    assert get_request_context() is opened
    assert opened
    assert (get_request_id(), get_correlation_id()) == ("req_1", "corr_1")


def test_the_end_of_a_call_restores_what_was_before() -> None:
    outer, inner = open_context(RequestContext("outer", "c")), open_context(RequestContext("inner", "c"))
    assert get_request_id() == "inner"
    close_context(inner)
    assert get_request_id() == "outer"
    close_context(outer)
    assert get_request_id() is None


def test_closing_from_another_context_does_nothing() -> None:
    token = open_context(RequestContext("r", "c"))
    Context().run(close_context, token)
    assert get_request_id() == "r"
    close_context(token)


def test_a_user_that_is_set_inside_is_seen_by_everybody(opened: RequestContext) -> None:
    set_context_user("bob", "umbrella")
    assert (opened.user_id, opened.tenant_id) == ("bob", "umbrella")


async def test_a_user_that_a_thread_sets_is_seen_outside_of_it() -> None:
    token = open_context(RequestContext("r", "c"))
    await to_thread(set_context_user, "bob")
    assert get_request_context().user_id == "bob"
    close_context(token)


def test_a_user_that_was_set_before_the_door_opened_is_adopted() -> None:
    def authenticate_then_open() -> RequestContext:
        set_context_user("ann", "acme")
        assert not get_request_context()
        open_context(RequestContext("r", "c"))
        return get_request_context()

    context = copy_interpreter_context().run(authenticate_then_open)
    assert (context.user_id, context.tenant_id) == ("ann", "acme")


def test_a_call_inside_of_a_call_does_not_inherit_its_user(opened: RequestContext) -> None:
    inner = RequestContext("inner", "c")
    token = open_context(inner)
    assert opened.user_id == "ann"
    assert inner.user_id is None
    close_context(token)


def test_log_fields_hold_what_is_known_and_follow_the_user() -> None:
    context = RequestContext("r", "c", protocol="grpc")
    assert context.log_fields() == {"request_id": "r", "correlation_id": "c", "protocol": "grpc"}
    assert context.log_fields() is context.log_fields()
    context.set_user("ann", "acme")
    assert context.log_fields() == {
        "request_id": "r",
        "correlation_id": "c",
        "protocol": "grpc",
        "user_id": "ann",
        "tenant_id": "acme",
    }
    context.set_user(None)
    assert "user_id" not in context.log_fields()


def test_a_log_event_gets_the_ids_and_keeps_its_own_keys(opened: RequestContext) -> None:
    event = {"event": "x", "user_id": "mine"}
    assert add_request_context(None, "info", event) == {**opened.log_fields(), "event": "x", "user_id": "mine"}


@pytest.mark.usefixtures("opened")
def test_tracing_headers_carry_the_ids_and_the_trace() -> None:
    assert get_tracing_headers() == {
        "x-correlation-id": "corr_1",
        "x-request-id": "req_1",
        "traceparent": TRACEPARENT,
        "tracestate": "a=1",
    }


@pytest.mark.parametrize(
    ("traceparent", "tracestate", "names"),
    [
        (None, None, {"x-correlation-id", "x-request-id"}),
        (None, "a=1", {"x-correlation-id", "x-request-id"}),
        (TRACEPARENT, None, {"x-correlation-id", "x-request-id", "traceparent"}),
    ],
)
def test_a_tracestate_never_travels_without_its_traceparent(
    traceparent: str | None, tracestate: str | None, names: set[str]
) -> None:
    token = open_context(RequestContext("r", "c", traceparent=traceparent, tracestate=tracestate))
    assert set(get_tracing_headers()) == names
    close_context(token)


@pytest.mark.parametrize("context", [RequestContext(), RequestContext("r"), RequestContext(None, "c")])
def test_half_a_context_sends_no_headers(context: RequestContext) -> None:
    token = open_context(context)
    assert get_tracing_headers() == {}
    close_context(token)


@pytest.mark.usefixtures("opened")
def test_a_snapshot_survives_a_queue_and_a_pickle() -> None:
    snapshot = copy_context()
    assert ContextSnapshot.from_dict(snapshot.to_dict()) == snapshot
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot  # noqa: S301 - our own bytes
    assert snapshot.to_dict() == {
        "request_id": "req_1",
        "correlation_id": "corr_1",
        "parent_request_id": "req_0",
        "user_id": "ann",
        "tenant_id": "acme",
        "protocol": "http",
        "traceparent": TRACEPARENT,
        "tracestate": "a=1",
    }


def test_a_snapshot_is_read_from_an_older_or_newer_senders_data() -> None:
    snapshot = ContextSnapshot.from_dict({"request_id": "r", "of_tomorrow": 1})
    assert snapshot == ContextSnapshot("r", None, None, None, None, None, None, None)


def test_a_snapshot_is_free_of_the_call_it_was_taken_from(opened: RequestContext) -> None:
    snapshot = copy_context()
    opened.set_user("bob")
    assert snapshot.user_id == "ann"


def test_a_restored_context_holds_for_a_block_and_leaks_nothing_back(opened: RequestContext) -> None:
    snapshot = copy_context()
    with restore_context(snapshot) as restored:
        assert get_request_context() is restored
        assert restored is not opened
        assert copy_context() == snapshot
        set_context_user("job")
    assert get_request_context() is opened
    assert opened.user_id == "ann"


def test_a_restored_context_holds_for_good_without_a_block() -> None:
    def job() -> str | None:
        restore_context(ContextSnapshot.from_dict({"request_id": "r", "correlation_id": "c"}))
        return get_request_id()

    assert copy_interpreter_context().run(job) == "r"
    assert get_request_id() is None


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_caller_that_says_how_long_it_waits_gives_the_call_its_deadline(protocol: Any) -> None:
    clock = ManualClock()
    called = Call(protocol, "op", Sent(x_request_timeout_ms="1500"))
    async with Pipeline(edge=[RequestContextPolicy(clock=clock)]).admit(called) as admission:
        context = admission.context
        assert context.deadline == clock.now + 1.5
        clock.advance(1.0)
        assert context.remaining() == context.remaining(clock.now) == 0.5
        clock.advance(1.0)
        assert context.remaining() == 0.0


@pytest.mark.parametrize(("sent", "seconds"), [("1", 0.001), ("30000", 30.0), ("86400000", 86_400.0)])
async def test_a_timeout_of_a_millisecond_to_a_day_is_taken(sent: str, seconds: float) -> None:
    policy = RequestContextPolicy(clock=ManualClock(0.0))
    async with Pipeline(edge=[policy]).admit(Call("http", "op", Sent(x_request_timeout_ms=sent))) as admission:
        assert admission.context.remaining() == seconds


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "0",
        "-1",
        "+1",
        "007",
        "1.5",
        "1e3",
        " 1",
        "1\n",
        "1s",
        "1, 2",
        "0x10",
        "1_000",
        "٣",
        "86400001",
        "9" * 60_000,
    ],
)
async def test_anything_else_that_a_caller_sends_as_its_timeout_is_ignored(sent: str) -> None:
    async with Pipeline().admit(Call("http", "op", Sent(x_request_timeout_ms=sent))) as admission:
        assert admission.context
        assert admission.context.deadline is None
        assert admission.context.remaining() is None
        assert wire.REQUEST_TIMEOUT not in get_tracing_headers()


@pytest.mark.parametrize(("passed", "told"), [(0.0, "1500"), (0.5, "1000"), (1.25, "250"), (1.5, "1"), (60.0, "1")])
def test_the_next_service_is_told_what_is_left_of_the_deadline_and_never_that_there_is_none(
    opened: RequestContext, passed: float, told: str
) -> None:
    clock = ManualClock()
    opened.set_deadline(clock() + 1.5, clock)
    clock.advance(passed)
    assert get_tracing_headers()["x-request-timeout-ms"] == told


def test_the_next_service_is_never_given_a_part_of_a_millisecond_more_than_is_left(opened: RequestContext) -> None:
    clock = ManualClock(0.0)
    opened.set_deadline(0.0019, clock)
    assert get_tracing_headers()["x-request-timeout-ms"] == "1"


def test_a_deadline_can_be_lifted(opened: RequestContext) -> None:
    clock = ManualClock()
    opened.set_deadline(clock() + 1, clock)
    opened.set_deadline(None, clock)
    assert opened.remaining() is None


def test_a_background_job_does_not_inherit_the_deadline(opened: RequestContext) -> None:
    clock = ManualClock()
    opened.set_deadline(clock() + 1, clock)
    with restore_context(copy_context()) as restored:
        assert restored.deadline is None
        assert "x-request-timeout-ms" not in get_tracing_headers()
    assert bind_context(get_request_context)().deadline is None


@pytest.mark.usefixtures("opened")
def test_the_user_and_the_tenant_are_never_sent_on() -> None:
    sent = get_tracing_headers()
    assert "ann" not in sent.values()
    assert "acme" not in sent.values()


class Traced:
    """OpenTelemetry's API with a span of its own current."""

    def __init__(self, *states: tuple[str, str], span_id: int = 0xB7AD6B7169203331) -> None:
        self.trace = pytest.importorskip("opentelemetry.trace")
        context = self.trace.SpanContext(
            0x0AF7651916CD43DD8448EB211C80319C, span_id, False, self.trace.TraceFlags(1), self.trace.TraceState(states)
        )
        self.current = self.trace.use_span(self.trace.NonRecordingSpan(context))


@pytest.mark.usefixtures("opened")
def test_the_current_span_is_sent_instead_of_the_inbound_trace() -> None:
    with Traced(("vendor", "x")).current:
        sent = get_tracing_headers()
    assert sent["traceparent"] == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert sent["tracestate"] == "vendor=x"


@pytest.mark.usefixtures("opened")
def test_the_inbound_tracestate_never_travels_with_another_trace() -> None:
    with Traced().current:
        assert "tracestate" not in get_tracing_headers()


@pytest.mark.usefixtures("opened")
def test_a_span_that_is_not_valid_leaves_the_inbound_trace() -> None:
    with Traced(span_id=0).current:
        assert get_tracing_headers()["traceparent"] == TRACEPARENT


@pytest.mark.usefixtures("opened")
def test_without_opentelemetry_the_inbound_trace_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    assert get_tracing_headers()["traceparent"] == TRACEPARENT
    assert "opentelemetry.trace" not in sys.modules


@pytest.mark.usefixtures("opened")
def test_a_snapshot_travels_as_json_in_a_queues_headers() -> None:
    def worker(headers: bytes) -> dict[str, Any]:
        restore_context(ContextSnapshot.from_dict(json.loads(headers)["context"]))
        return get_request_context().log_fields()

    message = json.dumps({"task": "send_receipt", "context": copy_context().to_dict()}).encode()
    assert Context().run(worker, message) == {
        "request_id": "req_1",
        "correlation_id": "corr_1",
        "protocol": "http",
        "user_id": "ann",
        "tenant_id": "acme",
    }


@pytest.mark.parametrize("name", ["auth0|5f7c", "ann smith", "Zoë Ünal", "名前", "a" * 256])
def test_a_users_name_of_the_applications_choice_survives_a_queue(name: str) -> None:
    token = open_context(RequestContext("r", "c", user_id=name, tenant_id=name))
    try:
        restored = ContextSnapshot.from_dict(json.loads(json.dumps(copy_context().to_dict())))
    finally:
        close_context(token)
    assert (restored.user_id, restored.tenant_id) == (name, name)


FORGED = ["", "a" * 513, "a\nb", "a\r\nlevel=error", "a\x1b[2J", "a\x00", "a\x85b", "a\u2028b", "a\u202eb", "\ud800"]
NO_TEXT = [None, 1, 1.5, True, b"req_1", ["req_1"], {"request_id": "req_1"}]


@pytest.mark.parametrize("value", [*FORGED, *NO_TEXT])
@pytest.mark.parametrize("name", ContextSnapshot.__slots__)
def test_what_a_door_would_not_have_let_in_does_not_come_in_through_a_queue(name: str, value: object) -> None:
    good = ContextSnapshot.from_dict({"request_id": "r", "correlation_id": "c"})
    bad = ContextSnapshot.from_dict({"request_id": "r", "correlation_id": "c", name: value})
    assert bad.to_dict() == {**good.to_dict(), name: None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_id", "a b"),
        ("correlation_id", 'a"b'),
        ("parent_request_id", "a" * 129),
        ("protocol", "smtp"),
        ("traceparent", TRACEPARENT.upper()),
        ("traceparent", f"00-{'0' * 32}-00f067aa0ba902b7-01"),
        ("tracestate", "é"),
    ],
)
def test_a_member_is_held_to_the_rule_of_its_own_kind(name: str, value: str) -> None:
    assert ContextSnapshot.from_dict({name: value}) == ContextSnapshot.from_dict({})


def noted() -> tuple[str | None, str | None]:
    return get_request_id(), get_request_context().user_id


@pytest.mark.usefixtures("opened")
async def test_a_bound_function_takes_the_context_into_an_executor() -> None:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        assert await loop.run_in_executor(pool, noted) == (None, None)
        assert await loop.run_in_executor(pool, bind_context(noted)) == ("req_1", "ann")
        assert await loop.run_in_executor(pool, noted) == (None, None)


@pytest.mark.usefixtures("opened")
def test_a_bound_function_takes_the_context_into_a_thread() -> None:
    found: list[tuple[str | None, str | None]] = []

    def note() -> None:
        found.append(noted())

    thread = Thread(target=bind_context(note))
    thread.start()
    thread.join(5)
    assert found == [("req_1", "ann")]


def test_each_run_of_a_bound_function_has_a_context_of_its_own(opened: RequestContext) -> None:
    def job(user: str | None) -> tuple[RequestContext, str | None]:
        before = get_request_context().user_id
        set_context_user(user)
        return get_request_context(), before

    bound = bind_context(job)
    (first, saw_first), (second, saw_second) = bound("one"), bound("two")
    assert (saw_first, saw_second) == ("ann", "ann")
    assert len({id(first), id(second), id(opened)}) == 3
    assert opened.user_id == "ann"


def test_a_bound_function_keeps_the_context_that_was_there_when_it_was_bound(opened: RequestContext) -> None:
    bound = bind_context(noted)
    opened.set_user("bob")
    assert bound() == ("req_1", "ann")
    assert get_request_context() is opened


class Callback:
    async def __call__(self) -> tuple[str | None, str | None]:
        return await noted_later()


async def noted_later() -> tuple[str | None, str | None]:
    await asyncio.sleep(0)
    return noted()


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("function", [noted_later, partial(noted_later), Callback()])
async def test_a_bound_coroutine_function_keeps_its_context_while_it_waits(function: Any) -> None:
    task = asyncio.create_task(bind_context(function)(), context=Context())
    assert await asyncio.wait_for(task, 5) == ("req_1", "ann")


@pytest.mark.usefixtures("opened")
def test_a_bound_function_passes_on_arguments_result_and_error_and_keeps_its_name() -> None:
    def divide(left: int, *, right: int) -> float:
        """Divide."""
        return left / right

    bound = bind_context(divide)
    assert bound(6, right=3) == 2
    with pytest.raises(ZeroDivisionError):
        bound(1, right=0)
    assert (bound.__name__, bound.__doc__) == ("divide", "Divide.")
    assert get_request_id() == "req_1"
