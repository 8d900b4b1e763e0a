"""Floor 4: verdicts as HTTP. Every status comes from ``wire.TABLE``."""

import json
from collections.abc import Iterable, Sequence

from starlette.types import Message, Send

from resilience import wire
from resilience.admission import Admission
from resilience.verdict import Reject, Reply
from resilience.wire import Reason

# Never kept in a reply: what belongs to one connection, one moment or one browser.
# Source: RFC 9110, 7.6.1 (hop-by-hop) and 6.6.1 (Date); RFC 6265, 4.1 (Set-Cookie).
_NOT_KEPT = wire.OURS | {
    "connection",
    "date",
    "keep-alive",
    "proxy-connection",
    "server",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_NOT_KEPT_NAMES = frozenset(name.encode() for name in _NOT_KEPT)
_ENCODED = {name: name.encode() for name in wire.OURS}
_OURS = frozenset(_ENCODED.values())
_PROBLEM = "application/problem+json"
# Source: draft-ietf-httpapi-ratelimit-headers-11, "Problem Types".
_PROBLEM_TYPES = {
    Reason.RATE_LIMITED: "https://iana.org/assignments/http-problem-types#quota-exceeded",
    Reason.STORE_UNAVAILABLE: "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
    Reason.DRAINING: "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
}


def with_metadata(
    headers: Iterable[tuple[bytes, bytes]], metadata: Sequence[tuple[str, str]]
) -> list[tuple[bytes, bytes]]:
    """Return a new header list in which each name of ``metadata`` stands once, with our value."""
    try:
        ours = [(_ENCODED[name], value.encode("latin-1")) for name, value in metadata]
    except KeyError:  # a policy of the application's own tells more
        ours = [(name.encode(), value.encode("latin-1")) for name, value in metadata]
        return _replaced(headers, ours)
    leaving = list(headers)
    for name, _ in leaving:
        if name.lower() in _OURS:
            return _replaced(leaving, ours)
    leaving += ours
    return leaving


def _replaced(headers: Iterable[tuple[bytes, bytes]], ours: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    names = dict(ours)
    return [pair for pair in headers if pair[0].lower() not in names] + ours


def kept_metadata(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    """Return the headers of a reply that its retries may see again."""
    return tuple(
        [
            (name.decode("latin-1").lower(), value.decode("latin-1"))
            for name, value in headers
            if name.lower() not in _NOT_KEPT_NAMES
        ]
    )


async def render_reject(reject: Reject, admission: Admission, send: Send) -> None:
    """Refuse: the plain body that FastAPI users know, or problem details for who accepts them.

    Source: RFC 9457, 3.
    """
    status = wire.TABLE[reject.reason].http
    content: dict[str, object] = {"detail": reject.message}
    media_type = "application/json"
    if _PROBLEM in (admission.call.metadata.get("accept") or ""):
        media_type = _PROBLEM
        content = {
            "type": _PROBLEM_TYPES.get(reject.reason, "about:blank"),
            "title": reject.message,
            "status": status,
            "code": reject.reason.value,
            "request_id": admission.context.request_id,
        }
    if reject.retry_after is not None:
        seconds = wire.whole_seconds(reject.retry_after)
        content["retry_after"] = seconds
        admission.metadata.append((wire.RETRY_AFTER, str(seconds)))
    await _send(send, status, media_type, json.dumps(content, separators=(",", ":")).encode())


async def render_reply(reply: Reply, send: Send) -> None:
    """Send a stored reply again."""
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.metadata]
    await send({"type": "http.response.start", "status": reply.code, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body, "more_body": False})


async def render_error(send: Send) -> None:
    """Answer for an exception that nobody handled; says nothing of it."""
    await _send(send, 500, "application/json", b'{"detail":"Internal Server Error"}')


async def render_client_gone(send: Send) -> None:
    """Answer a request that ended before it was whole: for the middlewares around, since the client is gone."""
    await _send(send, 400, "application/json", b'{"detail":"The request ended early"}')


async def refuse_websocket(reject: Reject, extensions: Iterable[str], admission: Admission, send: Send) -> None:
    """Refuse a handshake: with the HTTP answer where the server can send one, else by closing.

    Source: RFC 6455, 7.4.1: 1013, "try again later", or 1008, "policy violation".
    """
    if "websocket.http.response" in extensions:

        async def as_websocket(message: Message) -> None:
            await send({**message, "type": "websocket." + message["type"]})

        await render_reject(reject, admission, as_websocket)
    else:
        await send({"type": "websocket.close", "code": 1008 if reject.retry_after is None else 1013})


async def _send(send: Send, status: int, media_type: str, body: bytes) -> None:
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
