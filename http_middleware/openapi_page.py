"""Floor 4: how an OpenAPI page tells of refusals, keys and headers. Decides nothing; statuses are ``wire.TABLE``'s.

Everything the application declares itself stays as it is, and a component of ours takes another name where one is
taken. So writing twice changes nothing. Valid in OpenAPI 3.0 and 3.1 alike.
"""

from collections.abc import Iterable
from copy import deepcopy
from itertools import count
from typing import Any

from resilience import wire
from resilience.wire import TABLE, Reason

Json = dict[str, Any]

_SAYS = {
    Reason.RATE_LIMITED: "too many requests; there is room again after `Retry-After` seconds.",
    Reason.IDEMPOTENCY_KEY_MISSING: "this operation needs an `Idempotency-Key`.",
    Reason.IDEMPOTENCY_KEY_MALFORMED: "the `Idempotency-Key` is malformed, or was sent more than once.",
    Reason.IDEMPOTENCY_IN_PROGRESS: "a request with this `Idempotency-Key` is in progress; a retry gets its reply.",
    Reason.IDEMPOTENCY_PAYLOAD_MISMATCH: "this `Idempotency-Key` was used with another request.",
    Reason.IDEMPOTENCY_NOT_REPLAYABLE: "the operation is done, but its reply can't be shown again.",
    Reason.IDEMPOTENCY_ABANDONED: "the operation broke off and won't run again; it may have taken effect.",
    Reason.PAYLOAD_TOO_LARGE: "the request is too large to come with an `Idempotency-Key`.",
    Reason.DRAINING: "the service is about to stop; nothing was done.",
    Reason.STORE_UNAVAILABLE: "the service can't check limits or keys right now; nothing was done.",
}


def _header(description: str, kind: str = "string", **schema: object) -> Json:
    return {"description": description, "schema": {"type": kind, **schema}}


_IDS = {
    "X-Request-ID": _header("The id of this request, minted by the service."),
    "X-Correlation-ID": _header("The id of the whole chain of requests: the one that was sent, or a new one."),
}
_LIMITS = {
    "X-RateLimit-Limit": _header("Units per window, of the limit that is nearest to its end.", "integer", minimum=0),
    "X-RateLimit-Remaining": _header("Units that are left of it.", "integer", minimum=0),
    "X-RateLimit-Reset": _header("Seconds until there are more.", "integer", minimum=0),
    "RateLimit": _header("Each limit by name: `r` units left, `t` seconds until there are more."),
    "RateLimit-Policy": _header("Each limit by name: `q` units per `w` seconds."),
}
_RETRY_AFTER = {"Retry-After": _header("Seconds to wait before the same request can succeed.", "integer", minimum=1)}
_REPLAYED = {"X-Idempotent-Replayed": _header("Sent with the stored reply of an earlier request.", enum=["true"])}

_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": (
        "Makes retries safe: requests with one key run once, and each retry gets the first one's reply. "
        "1 to 255 visible ASCII characters without quotes or backslashes; it may stand in quotes."
    ),
    "schema": {
        "type": "string",
        "minLength": 1,
        "maxLength": 255,
        "pattern": r'^("[!#-\[\]-~]+"|[!#-\[\]-~]+)$',
    },
}
_RETRY_SECONDS: Json = {"type": "integer", "minimum": 1, "description": "Seconds to wait, as in `Retry-After`."}
_REFUSAL: Json = {
    "type": "object",
    "title": "Refusal",
    "required": ["detail"],
    "properties": {"detail": {"type": "string"}, "retry_after": _RETRY_SECONDS},
}
# Source: RFC 9457, 3.1.
_PROBLEM: Json = {
    "type": "object",
    "title": "RefusalProblem",
    "required": ["type", "title", "status", "code"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "enum": [reason.value for reason in TABLE]},
        "retry_after": _RETRY_SECONDS,
    },
}


def write_operation(page: Json, item: Json, operation: Json, reasons: frozenset[Reason], *, traced: bool) -> None:
    """Add to an operation what callers meet there.

    Args:
        page: the whole page, whose components take what operations share.
        item: the path's part of it.
        operation: the operation's part of that.
        reasons: why a policy may refuse it.
        traced: whether its replies carry ids.
    """
    ids = _IDS if traced else {}
    always = {**ids, **(_LIMITS if Reason.RATE_LIMITED in reasons else {})}
    by_status: dict[str, list[Reason]] = {}
    for reason, row in TABLE.items():
        if reason in reasons:
            by_status.setdefault(str(row.http), []).append(reason)
    responses: Json = operation.setdefault("responses", {})
    for status, response in responses.items():
        replayed = _REPLAYED if Reason.IDEMPOTENCY_NOT_REPLAYABLE in reasons and _is_kept(status) else {}
        _add_headers(page, response, {**always, **replayed, **_retry_after(by_status.get(status, ()))})
    for status, why in by_status.items():
        if status == "422" and {"422", "4XX", "default"}.intersection(responses):
            # FastAPI, too, takes any of these for the application's word on what is no valid request.
            _add_to_validation(page, responses.get("422", {}), why, ids)
        elif status not in responses:
            response = {"description": _says(why), "content": _content(page, ids)}
            _add_headers(page, response, {**always, **_retry_after(why)})
            responses[status] = _component(page, "responses", f"Refused{status}", response)
    if Reason.IDEMPOTENCY_KEY_MALFORMED in reasons and not _names_the_key(page, item, operation):
        required = Reason.IDEMPOTENCY_KEY_MISSING in reasons
        name = "RequiredIdempotencyKey" if required else "IdempotencyKey"
        key = _component(page, "parameters", name, {**_KEY, "required": required})
        operation.setdefault("parameters", []).append(key)


def _add_to_validation(page: Json, response: Json, why: list[Reason], ids: Json) -> None:
    """Add to the 422 that FastAPI declares by itself; one that the application declared is its own."""
    if response.get("description") != "Validation Error":
        return
    content: Json = response.get("content", {})
    schema = content.get("application/json", {}).get("schema")
    if schema == {"$ref": "#/components/schemas/HTTPValidationError"}:
        ours = _content(page, ids)
        content["application/json"]["schema"] = {"anyOf": [schema, ours["application/json"]["schema"]]}
        content.update({kind: held for kind, held in ours.items() if kind not in content})
        response["description"] += f", or {_says(why)}"


def _content(page: Json, ids: Json) -> Json:
    properties = _PROBLEM["properties"] | ({"request_id": {"type": "string"}} if ids else {})
    problem = _component(page, "schemas", "RefusalProblem", {**_PROBLEM, "properties": properties})
    refusal = _component(page, "schemas", "Refusal", _REFUSAL)
    return {"application/json": {"schema": refusal}, "application/problem+json": {"schema": problem}}


def _says(why: list[Reason]) -> str:
    return "\n\n".join(f"`{reason.value}`: {_SAYS[reason]}" for reason in why)


def _retry_after(why: Iterable[Reason]) -> Json:
    return _RETRY_AFTER if any(TABLE[reason].retry == "after" for reason in why) else {}


def _is_kept(status: str) -> bool:
    code = status.upper().replace("XX", "00")
    return code.isdecimal() and wire.is_final_http(int(code))


def _add_headers(page: Json, response: Json, headers: Json) -> None:
    present = response.get("headers", {})
    taken = {name.lower() for name in present}
    missing = {name: header for name, header in headers.items() if name.lower() not in taken}
    if missing and "$ref" not in response:
        told = {name: _component(page, "headers", name, header) for name, header in missing.items()}
        response["headers"] = {**present, **told}


def _names_the_key(page: Json, item: Json, operation: Json) -> bool:
    held = page.get("components", {}).get("parameters", {})
    for parameter in (*item.get("parameters", ()), *operation.get("parameters", ())):
        told = held.get(parameter.get("$ref", "").rpartition("/")[2], parameter)
        if told.get("in") == "header" and told.get("name", "").lower() == wire.IDEMPOTENCY_KEY:
            return True
    return False


def _component(page: Json, section: str, name: str, value: Json) -> Json:
    """Return a reference to ``value`` among the page's components, under the first name that is its own or free."""
    held: Json = page.setdefault("components", {}).setdefault(section, {})
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    chosen = next(one for one in names if held.setdefault(one, value) == value)
    if held[chosen] is value:
        held[chosen] = deepcopy(value)
    return {"$ref": f"#/components/{section}/{chosen}"}
