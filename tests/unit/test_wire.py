import pytest

from resilience import wire
from resilience.decisions.quota import Quota, Usage
from resilience.wire import (
    TABLE,
    Reason,
    is_final_grpc,
    is_final_http,
    policy_field,
    pushback_ms,
    usage_field,
    whole_seconds,
)

# Source: grpc/doc/statuscodes.md.
GRPC_CODES = {
    3: "INVALID_ARGUMENT",
    6: "ALREADY_EXISTS",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    14: "UNAVAILABLE",
}


def test_every_reason_has_one_row() -> None:
    assert set(TABLE) == set(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_a_rows_number_and_name_are_one_grpc_code(reason: Reason) -> None:
    assert GRPC_CODES[TABLE[reason].grpc] == TABLE[reason].grpc_name


@pytest.mark.parametrize("reason", Reason)
def test_a_refusal_that_a_retry_may_better_is_never_a_final_answer(reason: Reason) -> None:
    row = TABLE[reason]
    if row.retry == "after":
        assert not is_final_http(row.http)
        assert not is_final_grpc(row.grpc)


@pytest.mark.parametrize("status", [200, 201, 204, 301, 304, 400, 404, 410, 422, 451, 499])
def test_an_http_answer_that_a_retry_wont_better_is_final(status: int) -> None:
    assert is_final_http(status)


@pytest.mark.parametrize("status", [100, 101, 199, 401, 403, 408, 409, 423, 425, 429, 500, 502, 503, 599])
def test_an_http_answer_that_a_retry_may_better_is_not_final(status: int) -> None:
    assert not is_final_http(status)


def test_a_grpc_answer_is_final_where_a_retry_wont_better_it() -> None:
    assert [code for code in range(17) if is_final_grpc(code)] == [0, 3, 5, 6, 9, 11, 12]


def test_names_are_lower_case_since_grpc_demands_it() -> None:
    assert {name.lower() for name in wire.OURS} == wire.OURS
    for name in (wire.TRACEPARENT, wire.TRACESTATE, wire.IDEMPOTENCY_KEY):
        assert name == name.lower()


def test_a_callers_own_names_are_not_ours() -> None:
    assert wire.OURS.isdisjoint({wire.TRACEPARENT, wire.TRACESTATE, wire.IDEMPOTENCY_KEY, "content-type", "etag"})


def test_the_policy_field_lists_limit_and_window_in_whole_seconds() -> None:
    quotas = [("burst", Quota(10, per=0.5)), ("100/minute", Quota(100, per=60)), ("odd", Quota(1, per=1.25))]
    assert policy_field(quotas) == '"burst";q=10;w=1, "100/minute";q=100;w=60, "odd";q=1;w=2'


def test_the_usage_field_lists_what_is_left_and_when_there_is_more() -> None:
    usages = [
        ("burst", Usage(True, 10, 7, 0.2, 0.0)),
        ("day", Usage(False, 5, 0, 60.0, 60.0)),
        ("x", Usage(True, 5, 5, 0.0, 0.0)),
    ]
    assert usage_field(usages) == '"burst";r=7;t=1, "day";r=0;t=60, "x";r=5;t=0'


def test_nothing_to_tell_is_an_empty_field() -> None:
    assert policy_field([]) == usage_field([]) == ""


@pytest.mark.parametrize(
    ("wait", "seconds"), [(0.000001, 1), (0.5, 1), (1.0, 1), (1.000001, 1), (1.1, 2), (60.0, 60), (60.000001, 60)]
)
def test_a_wait_is_told_in_whole_seconds_and_never_zero(wait: float, seconds: int) -> None:
    assert whole_seconds(wait) == seconds


@pytest.mark.parametrize(
    ("reason", "retry_after", "told"),
    [
        (Reason.RATE_LIMITED, 0.0000001, 1),
        (Reason.RATE_LIMITED, 0.25, 250),
        (Reason.RATE_LIMITED, 0.2501, 251),
        (Reason.RATE_LIMITED, 30.0, 30_000),
        (Reason.RATE_LIMITED, 30.1, -1),
        (Reason.RATE_LIMITED, None, None),
        (Reason.DRAINING, 1.0, 1000),
        (Reason.STORE_UNAVAILABLE, 1.0, 1000),
        (Reason.IDEMPOTENCY_IN_PROGRESS, 5.0, 5000),
        (Reason.IDEMPOTENCY_ABANDONED, None, -1),
        (Reason.IDEMPOTENCY_ABANDONED, 1.0, -1),
        (Reason.PAYLOAD_TOO_LARGE, None, -1),
        (Reason.IDEMPOTENCY_KEY_MISSING, None, None),
        (Reason.IDEMPOTENCY_PAYLOAD_MISMATCH, 1.0, None),
        (Reason.IDEMPOTENCY_NOT_REPLAYABLE, None, None),
    ],
)
def test_a_grpc_client_is_told_when_to_retry_or_never(
    reason: Reason, retry_after: float | None, told: int | None
) -> None:
    assert pushback_ms(reason, retry_after) == told


def test_the_longest_pushback_can_be_set() -> None:
    assert pushback_ms(Reason.RATE_LIMITED, 59.0, cap=60.0) == 59_000
    assert pushback_ms(Reason.RATE_LIMITED, 61.0, cap=60.0) == -1
