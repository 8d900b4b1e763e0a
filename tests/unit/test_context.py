import pickle
from asyncio import to_thread
from collections.abc import Iterator
from contextvars import Context
from contextvars import copy_context as copy_interpreter_context

import pytest

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
