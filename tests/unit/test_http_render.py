import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Send

from http_middleware.call import HeaderMetadata
from http_middleware.render import (
    kept_metadata,
    refuse_websocket,
    render_error,
    render_reject,
    render_reply,
    with_metadata,
)
from resilience import Admission, Call, Pipeline, Reason, Reject, Reply, RequestContext

PROBLEM = b"application/problem+json"
# What each refusal is over HTTP: the status, and whether waiting helps.
STATUS = {
    "rate_limited": 429,
    "idempotency_key_missing": 400,
    "idempotency_key_malformed": 400,
    "idempotency_in_progress": 409,
    "idempotency_payload_mismatch": 422,
    "idempotency_not_replayable": 409,
    "idempotency_abandoned": 409,
    "payload_too_large": 413,
    "draining": 503,
    "store_unavailable": 503,
}


def admission_of(*headers: tuple[bytes, bytes]) -> Admission:
    admission = Pipeline(edge=(), identify=lambda _call: None).admit(Call("http", "GET /", HeaderMetadata(headers)))
    admission.context = RequestContext("req_1", "cor_1")
    return admission


def sent_by(render: Callable[[Send], Awaitable[None]]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def scenario() -> None:
        await render(send)

    asyncio.run(scenario())
    return sent


def rejected(reject: Reject, admission: Admission) -> tuple[int, dict[bytes, bytes], Any]:
    start, body = sent_by(lambda send: render_reject(reject, admission, send))
    assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
    assert body.get("more_body", False) is False
    return start["status"], dict(start["headers"]), json.loads(body["body"])


def test_metadata_is_added_to_the_headers() -> None:
    assert with_metadata([(b"a", b"1")], [("b", "2")]) == [(b"a", b"1"), (b"b", b"2")]


def test_metadata_takes_the_place_of_a_header_whatever_its_case() -> None:
    headers = [(b"X-Request-ID", b"1"), (b"a", b"1"), (b"x-request-id", b"2")]

    assert with_metadata(headers, [("x-request-id", "3")]) == [(b"a", b"1"), (b"x-request-id", b"3")]


def test_headers_that_are_not_ours_keep_their_case_number_and_order() -> None:
    headers = [(b"Link", b"1"), (b"A", b""), (b"link", b"2")]

    assert with_metadata(headers, [("x-request-id", "3")])[:3] == headers


def test_the_header_list_that_is_handed_in_stays_as_it_is() -> None:
    headers = [(b"x-request-id", b"1")]

    with_metadata(headers, [("x-request-id", "2")])

    assert headers == [(b"x-request-id", b"1")]


@pytest.mark.parametrize(
    "name",
    [
        "Set-Cookie",
        "Date",
        "Server",
        "Connection",
        "Keep-Alive",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
        "X-Request-ID",
        "X-Correlation-ID",
        "X-Idempotent-Replayed",
        "Retry-After",
        "X-RateLimit-Limit",
        "X-RateLimit-Remaining",
        "X-RateLimit-Reset",
        "RateLimit",
        "RateLimit-Policy",
    ],
)
def test_what_belongs_to_one_connection_one_moment_or_one_browser_is_not_kept(name: str) -> None:
    assert kept_metadata([(name.encode(), b"1"), (name.lower().encode(), b"2")]) == ()


def test_everything_else_is_kept_in_number_and_order_with_names_in_lower_case() -> None:
    headers = [(b"Link", b"1"), (b"Content-Type", b"text/plain"), (b"link", b"\xe9"), (b"ETag", b'"1"')]

    assert kept_metadata(headers) == (("link", "1"), ("content-type", "text/plain"), ("link", "é"), ("etag", '"1"'))


def test_every_reason_has_a_status_in_this_table() -> None:
    assert {reason.value for reason in Reason} == set(STATUS)


@pytest.mark.parametrize("reason", Reason)
def test_a_refusal_is_plain_json_with_the_status_of_its_reason(reason: Reason) -> None:
    status, headers, content = rejected(Reject(reason, "No"), admission_of())

    assert status == STATUS[reason.value]
    assert headers[b"content-type"] == b"application/json"
    assert content == {"detail": "No"}


@pytest.mark.parametrize("reason", Reason)
def test_a_refusal_is_problem_details_for_who_accepts_them(reason: Reason) -> None:
    status, headers, content = rejected(Reject(reason, "No"), admission_of((b"accept", PROBLEM)))

    assert headers[b"content-type"] == PROBLEM
    assert status == STATUS[reason.value]
    assert content.pop("type").startswith(("about:blank", "https://iana.org/assignments/http-problem-types#"))
    assert content == {"title": "No", "status": status, "code": reason.value, "request_id": "req_1"}


@pytest.mark.parametrize("accept", [b"", b"*/*", b"application/json", b"text/html", b"application/*"])
def test_who_does_not_ask_for_problem_details_gets_the_plain_body(accept: bytes) -> None:
    _, headers, _ = rejected(Reject(Reason.RATE_LIMITED, "No"), admission_of((b"accept", accept)))

    assert headers[b"content-type"] == b"application/json"


@pytest.mark.parametrize(("wait", "seconds"), [(0.001, 1), (1.0, 1), (1.001, 2), (45.0, 45), (44.2, 45)])
def test_a_wait_is_told_in_whole_seconds_that_are_enough_in_body_and_header(wait: float, seconds: int) -> None:
    admission = admission_of()

    _, _, content = rejected(Reject(Reason.RATE_LIMITED, "No", wait), admission)

    assert content == {"detail": "No", "retry_after": seconds}
    assert ("retry-after", str(seconds)) in admission.metadata


def test_without_a_wait_none_is_told() -> None:
    admission = admission_of()

    _, _, content = rejected(Reject(Reason.RATE_LIMITED, "No"), admission)

    assert content == {"detail": "No"}
    assert admission.metadata == []


def test_the_length_of_a_refusal_is_that_of_its_bytes() -> None:
    start, body = sent_by(lambda send: render_reject(Reject(Reason.RATE_LIMITED, "Nö"), admission_of(), send))

    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()


def test_a_stored_reply_leaves_as_it_was() -> None:
    reply = Reply("http", 201, (("link", "1"), ("link", "é")), b"\x00\xff")

    assert sent_by(lambda send: render_reply(reply, send)) == [
        {"type": "http.response.start", "status": 201, "headers": [(b"link", b"1"), (b"link", b"\xe9")]},
        {"type": "http.response.body", "body": b"\x00\xff", "more_body": False},
    ]


def test_what_was_kept_of_a_reply_leaves_byte_for_byte() -> None:
    headers = [(b"x-odd", bytes(range(128, 256))), (b"link", b"a"), (b"link", b"b")]

    start, _ = sent_by(lambda send: render_reply(Reply("http", 200, kept_metadata(headers), b""), send))

    assert start["headers"] == headers


def test_an_answer_to_an_error_says_nothing_but_that() -> None:
    start, body = sent_by(render_error)

    assert start["status"] == 500
    assert body["body"] == b'{"detail":"Internal Server Error"}'


@pytest.mark.parametrize(("wait", "code"), [(5.0, 1013), (None, 1008)])
def test_a_handshake_is_refused_by_closing_where_the_server_can_send_no_answer(wait: float | None, code: int) -> None:
    reject = Reject(Reason.RATE_LIMITED, "No", wait)

    sent = sent_by(lambda send: refuse_websocket(reject, ["tls"], admission_of(), send))

    assert sent == [{"type": "websocket.close", "code": code}]


def test_a_handshake_is_refused_with_an_answer_where_the_server_can_send_one() -> None:
    reject = Reject(Reason.RATE_LIMITED, "No", 5.0)

    start, body = sent_by(lambda send: refuse_websocket(reject, ["websocket.http.response"], admission_of(), send))

    assert (start["type"], start["status"]) == ("websocket.http.response.start", 429)
    assert body["type"] == "websocket.http.response.body"
    assert json.loads(body["body"]) == {"detail": "No", "retry_after": 5}
