"""Idempotency as a dependency: what handlers that deal with the key themselves can rely on."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse, Response
from starlette.types import Message

from http_middleware import IdempotencyMiddleware, RequestContextMiddleware, ResilienceMiddleware, install
from http_middleware.guard import CheckResult, IdempotencyGuard, get_idempotency_guard, require_idempotency_key
from resilience import ConfigurationError, IdempotencyPolicy, MemoryStore, Pipeline, Policy, RateLimitPolicy
from resilience.decorators import idempotent, rate_limit
from resilience.testing import FaultyStore, ManualClock
from tests.integration.http_driver import Wire, connect, http_scope, upload, within

KEY = {"Idempotency-Key": "key_1"}
PROBLEM = {"Accept": "application/problem+json"}
KEY_HEADER = (b"idempotency-key", b"key_1")
Guard = Annotated[IdempotencyGuard, Depends(get_idempotency_guard)]
Key = Annotated[str, Depends(require_idempotency_key)]


def replayed(found: CheckResult) -> JSONResponse:
    headers = {"X-Idempotent-Replayed": "true"}
    return JSONResponse(found.cached_response, found.cached_status_code, headers)


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get_list("x-idempotent-replayed") == ["true"]


@rate_limit(max_requests=1, cost=2)
async def _notify() -> None:
    raise AssertionError


async def _another_guard(request: Request) -> IdempotencyGuard:
    return await get_idempotency_guard(request)


class Till:
    """An application that counts what its handlers did beyond the check."""

    def __init__(self, *core: Policy) -> None:
        self.runs: Counter[str] = Counter()
        self.found: list[CheckResult] = []
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.store = FaultyStore(MemoryStore(clock=ManualClock()))
        self.app = FastAPI()
        for handler in (
            self.pay,
            self.wait,
            self.text,
            self.empty,
            self.fail,
            self.fail_quietly,
            self.complete_and_break,
            self.complete_and_refuse,
            self.complete_and_meet_a_limit,
            self.complete_and_fail,
            self.complete_what_is_no_json,
            self.only_start,
            self.check_often,
            self.decorated,
            self.raw,
            self.two_guards,
            self.background,
        ):
            self.app.add_api_route(f"/{handler.__name__}", handler, methods=["POST", "GET"], status_code=201)
        install(self.app, Pipeline(core, store=self.store))

    async def _once(self, name: str, idem: IdempotencyGuard) -> CheckResult:
        found = await idem.check()
        if not found.is_duplicate:
            self.runs[name] += 1
        self.found.append(found)
        return found

    async def pay(self, idem: Guard, payment: dict[str, Any]) -> Any:
        found = await self._once("pay", idem)
        if found.is_duplicate:
            return replayed(found)
        await idem.start("pay")
        receipt = {"run": self.runs["pay"], **payment}
        await idem.complete(receipt)
        return receipt

    async def wait(self, idem: Guard) -> Any:
        found = await self._once("wait", idem)
        if found.is_duplicate:
            return replayed(found)
        self.started.set()
        await within(self.go_on.wait())
        return {"run": self.runs["wait"]}

    async def text(self, idem: Guard) -> Any:
        await self._once("text", idem)
        return Response("naïve, not JSON", media_type="text/plain")

    async def empty(self, idem: Guard) -> Any:
        await self._once("empty", idem)
        return Response(status_code=204)

    async def fail(self, idem: Guard) -> Any:
        await self._once("fail", idem)
        await idem.start("fail")
        await idem.fail("secret reason")
        if self.runs["fail"] == 1:
            raise HTTPException(422, "declined")
        return {"run": self.runs["fail"]}

    async def fail_quietly(self, idem: Guard) -> Any:
        await self._once("fail_quietly", idem)
        await idem.fail("secret reason")
        return {"run": self.runs["fail_quietly"]}

    async def complete_and_break(self, idem: Guard) -> Any:
        found = await self._once("complete_and_break", idem)
        if found.is_duplicate:
            return replayed(found)
        await idem.complete({"paid": "ä"}, status_code=202)
        raise RuntimeError("broken")

    async def complete_and_refuse(self, idem: Guard) -> Any:
        found = await self._once("complete_and_refuse", idem)
        if found.is_duplicate:
            return replayed(found)
        await idem.complete({"paid": 1})
        raise HTTPException(503, "Try again")

    async def complete_and_meet_a_limit(self, idem: Guard) -> Any:
        found = await self._once("complete_and_meet_a_limit", idem)
        if found.is_duplicate:
            return replayed(found)
        await idem.complete({"paid": 1})
        await _notify()
        raise AssertionError

    async def complete_and_fail(self, idem: Guard) -> Any:
        found = await self._once("complete_and_fail", idem)
        if found.is_duplicate:
            return replayed(found)
        await idem.complete({"paid": 1})
        await idem.fail("too late")
        return {"paid": 1, "left": True}

    async def complete_what_is_no_json(self, idem: Guard) -> Any:
        await self._once("complete_what_is_no_json", idem)
        try:
            await idem.complete({"share": float("nan"), "of": "secret"})
        except Exception as error:
            await idem.fail(str(error))
            raise
        raise RuntimeError("broken")

    async def only_start(self, idem: Guard) -> Any:
        await idem.start("only_start")
        self.runs["only_start"] += 1
        return {"operation": idem.operation}

    async def check_often(self, idem: Guard) -> Any:
        results = await asyncio.gather(*(idem.check() for _ in range(3)))
        await idem.start("first")
        await idem.start("second")
        results.append(await idem.check())
        if results[0].is_duplicate:
            return replayed(results[0])
        self.runs["check_often"] += 1
        for _ in range(2):
            await idem.complete({"same": len(set(results))})
        return {"same": len(set(results))}

    @idempotent()
    async def decorated(self, idem: Guard) -> Any:
        await self._once("decorated", idem)
        return {"run": self.runs["decorated"]}

    async def raw(self, idem: Guard, request: Request) -> Any:
        body = await request.body()
        found = await self._once("raw", idem)
        return replayed(found) if found.is_duplicate else {"size": len(body)}

    async def two_guards(self, idem: Guard, again: Annotated[IdempotencyGuard, Depends(_another_guard)]) -> Any:
        found = await self._once("two_guards", idem)
        assert await again.check() == found
        return replayed(found) if found.is_duplicate else {"run": self.runs["two_guards"]}

    async def background(self, idem: Guard, tasks: BackgroundTasks, request: Request) -> Any:
        found = await self._once("background", idem)
        if found.is_duplicate:
            return replayed(found)

        async def ask_again() -> None:
            self.runs["task"] += 1
            self.seen = await connect(self.app, headers=KEY).post(request.url.path)

        tasks.add_task(ask_again)
        return {"run": self.runs["background"]}


async def twice(till: Till, path: str, **options: Any) -> tuple[httpx.Response, httpx.Response]:
    client = connect(till.app, headers=KEY)
    return await client.post(path, **options), await client.post(path, **options)


ORDINARY = [{"amount": 100, "note": "ä €", "tags": [1, 2.5, None, True]}, {}, {"nested": {"a": {"b": '\n"'}}}]


@pytest.mark.parametrize("payment", ORDINARY)
async def test_a_replay_equals_the_first_reply(payment: dict[str, Any]) -> None:
    till = Till()

    first, retry = await twice(till, "/pay", json=payment)

    assert first.status_code == retry.status_code == 201
    assert first.content == retry.content
    assert not is_replay(first)
    assert is_replay(retry)
    assert till.found == [CheckResult(False), CheckResult(True, {"run": 1, **payment}, 201)]


async def test_of_fifty_requests_with_one_key_the_handler_runs_once() -> None:
    till = Till()
    client = connect(till.app, headers={**KEY, **PROBLEM})

    finished = asyncio.as_completed([asyncio.create_task(client.post("/wait")) for _ in range(50)])
    refused = [await within(next(finished)) for _ in range(49)]
    till.go_on.set()
    first = await within(next(finished))

    assert till.runs["wait"] == 1
    assert {(response.status_code, response.json()["code"]) for response in refused} == {
        (409, "idempotency_in_progress")
    }
    assert all(response.headers["retry-after"].isdecimal() for response in refused)
    assert (first.status_code, first.json()) == (201, {"run": 1})
    retry = await client.post("/wait")
    assert is_replay(retry)
    assert retry.content == first.content


async def test_a_reply_that_is_no_json_is_shown_as_text() -> None:
    till = Till()

    await twice(till, "/text")

    assert till.found[1] == CheckResult(True, "naïve, not JSON", 200)


@pytest.mark.parametrize("body", [b"NaN", b"[" * 100_000, b"\xff"])
async def test_a_reply_that_only_looks_like_json_is_shown_as_text(body: bytes) -> None:
    till = Till()
    found: list[CheckResult] = []

    @till.app.post("/odd")
    async def odd(idem: Guard) -> Response:
        found.append(await idem.check())
        return Response(body)

    await twice(till, "/odd")

    assert found[1].cached_response == body.decode("utf-8", "replace")


async def test_a_reply_without_a_body_is_shown_as_none() -> None:
    till = Till()

    await twice(till, "/empty")

    assert till.found[1] == CheckResult(True, None, 204)


async def test_requests_without_a_key_each_run_and_nothing_is_kept() -> None:
    till = Till()
    client = connect(till.app)

    for path in ("/pay", "/pay", "/fail_quietly", "/fail_quietly", "/check_often", "/check_often"):
        assert (await client.post(path, json={"amount": 1})).status_code == 201

    assert set(till.runs.values()) == {2}


async def test_a_method_without_effects_runs_each_time_although_it_has_a_key() -> None:
    till = Till()
    client = connect(till.app, headers=KEY)

    assert [(await client.get("/fail_quietly")).json() for _ in range(2)] == [{"run": 1}, {"run": 2}]


async def test_asking_often_and_at_once_is_asking_once() -> None:
    till = Till()

    first, retry = await twice(till, "/check_often")

    assert first.json() == {"same": 1}
    assert is_replay(retry)
    assert till.runs["check_often"] == 1


async def test_two_dependants_of_one_request_share_its_claim() -> None:
    till = Till()

    first, retry = await twice(till, "/two_guards")

    assert first.json() == {"run": 1}
    assert is_replay(retry)


async def test_start_alone_claims_the_key_and_answers_a_duplicate_itself() -> None:
    till = Till()

    first, retry = await twice(till, "/only_start")

    assert first.json() == {"operation": "only_start"}
    assert is_replay(retry)
    assert retry.content == first.content
    assert till.runs["only_start"] == 1


async def test_fail_frees_the_key_at_once_even_where_the_reply_would_be_final() -> None:
    till = Till()

    first, retry = await twice(till, "/fail")

    assert first.status_code == 422
    assert (retry.status_code, retry.json()) == (201, {"run": 2})


async def test_fail_holds_although_the_handler_then_answers() -> None:
    till = Till()

    first, retry = await twice(till, "/fail_quietly")

    assert (first.json(), retry.json()) == ({"run": 1}, {"run": 2})


async def test_what_fail_is_told_reaches_neither_a_reply_nor_a_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    replies = await twice(Till(), "/fail")

    assert not [reply for reply in replies if "secret" in reply.text]
    assert "secret" not in caplog.text


async def test_a_completed_operation_never_runs_again_although_its_handler_breaks() -> None:
    till = Till()

    first, retry = await twice(till, "/complete_and_break")

    assert first.status_code == 500
    assert is_replay(retry)
    assert (retry.status_code, retry.json()) == (202, {"paid": "ä"})
    assert till.runs["complete_and_break"] == 1


@pytest.mark.parametrize(("path", "status"), [("complete_and_refuse", 503), ("complete_and_meet_a_limit", 429)])
async def test_a_completed_operation_never_runs_again_although_its_reply_asks_for_it(path: str, status: int) -> None:
    till = Till()

    first, retry = await twice(till, f"/{path}")

    assert first.status_code == status
    assert (retry.status_code, retry.json()) == (200, {"paid": 1})
    assert till.runs[path] == 1


async def test_fail_after_complete_changes_nothing_and_the_reply_that_leaves_is_kept() -> None:
    till = Till()

    first, retry = await twice(till, "/complete_and_fail")

    assert retry.json() == first.json() == {"paid": 1, "left": True}
    assert retry.status_code == first.status_code == 201


async def test_an_operation_completed_with_what_is_no_json_never_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    till = Till()

    first, retry = await twice(till, "/complete_what_is_no_json", headers=PROBLEM)

    assert first.status_code == 500
    assert (retry.status_code, retry.json()["code"]) == (409, "idempotency_not_replayable")
    assert till.runs["complete_what_is_no_json"] == 1
    assert "secret" not in caplog.text


async def test_an_operation_can_be_completed_with_what_fastapi_knows() -> None:
    till = Till()

    @till.app.post("/known")
    async def known(idem: Guard) -> Any:
        found = await idem.check()
        if found.is_duplicate:
            return replayed(found)
        await idem.complete({"amount": Decimal("1.50"), "by": KEY_HEADER[1]})
        raise RuntimeError

    _, retry = await twice(till, "/known")

    assert retry.json() == {"amount": 1.5, "by": "key_1"}


async def test_a_handler_that_neither_completes_nor_fails_is_judged_by_its_reply() -> None:
    till = Till()

    @till.app.post("/status/{status}")
    async def answer(idem: Guard, status: int) -> Any:
        found = await idem.check()
        till.runs[str(status)] += not found.is_duplicate
        return replayed(found) if found.is_duplicate else Response(status_code=status)

    for status in (201, 404, 503):
        client = connect(till.app, headers={"Idempotency-Key": f"key_{status}"})
        for _ in range(2):
            await client.post(f"/status/{status}")

    assert till.runs == {"201": 1, "404": 1, "503": 2}


async def test_guard_and_policy_in_front_do_not_meet_each_other() -> None:
    till = Till(IdempotencyPolicy(MemoryStore(clock=ManualClock())))

    first, retry = await twice(till, "/pay", json={"amount": 1})

    assert first.status_code == 201
    assert is_replay(retry)
    assert retry.content == first.content
    assert till.found == [CheckResult(False)]


@pytest.mark.parametrize("required", [False, True])
async def test_guard_and_idempotency_middleware_do_not_meet_each_other(required: bool) -> None:
    till = Till()
    till.app.add_middleware(IdempotencyMiddleware, required=required)

    first, retry = await twice(till, "/pay", json={"amount": 1})

    assert first.status_code == 201
    assert is_replay(retry)
    assert retry.content == first.content
    assert till.found == [CheckResult(False)]


async def test_a_limit_in_front_counts_duplicates_too_and_is_told_once() -> None:
    till = Till(RateLimitPolicy(MemoryStore(clock=ManualClock()), "9/minute"))

    _, retry = await twice(till, "/pay", json={"amount": 1})

    assert is_replay(retry)
    assert retry.headers.get_list("x-ratelimit-remaining") == ["7"]


async def test_fail_frees_the_key_that_a_policy_in_front_holds() -> None:
    till = Till(IdempotencyPolicy(MemoryStore(clock=ManualClock())))

    first, retry = await twice(till, "/fail_quietly")

    assert (first.json(), retry.json()) == ({"run": 1}, {"run": 2})


async def test_guard_and_decorator_do_not_meet_each_other() -> None:
    till = Till()

    first, retry = await twice(till, "/decorated")

    assert first.json() == retry.json() == {"run": 1}
    assert is_replay(retry)


async def test_a_key_with_another_body_is_refused() -> None:
    till = Till()
    client = connect(till.app, headers={**KEY, **PROBLEM})
    await client.post("/pay", json={"amount": 1})

    response = await client.post("/pay", json={"amount": 2})

    assert (response.status_code, response.json()["code"]) == (422, "idempotency_payload_mismatch")
    assert response.headers["x-request-id"].startswith("req_")
    assert till.runs["pay"] == 1


async def test_a_malformed_key_is_refused() -> None:
    till = Till()

    response = await connect(till.app, headers={"Idempotency-Key": "a b"}).post("/pay", json={})

    assert response.status_code == 400
    assert till.runs == {}


async def test_a_body_over_the_bound_is_refused() -> None:
    till = Till()

    response = await connect(till.app, headers=KEY).post("/pay", json={"note": "x" * 2**20})

    assert response.status_code == 413
    assert till.runs == {}


async def test_a_store_that_is_gone_refuses_a_keyed_request() -> None:
    till = Till()
    till.store.down = True

    keyed = await connect(till.app, headers=KEY).post("/pay", json={})
    plain = await connect(till.app).post("/pay", json={})

    assert (keyed.status_code, keyed.headers["retry-after"]) == (503, "1")
    assert plain.status_code == 201


async def test_a_refusal_that_a_handler_swallows_stays_one() -> None:
    till = Till()

    @till.app.post("/stubborn")
    async def stubborn(idem: Guard) -> str:
        for _ in range(2):
            try:
                await idem.check()
            except Exception:
                till.store.down = False
            else:
                till.runs["stubborn"] += 1
        return "done"

    till.store.down = True
    response = await connect(till.app, headers=KEY).post("/stubborn")

    assert response.status_code == 503
    assert till.runs == {}


async def test_a_client_that_leaves_before_its_body_is_whole_is_no_error() -> None:
    till = Till()
    messages: list[Message] = [upload(b"half", b"")[0], {"type": "http.disconnect"}]

    wire = await Wire(messages).run(till.app, http_scope("POST", "/wait", KEY_HEADER))

    assert wire.status == 400
    assert till.runs == {}


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "text/plain"])
async def test_what_the_handler_has_read_counts_as_the_request(kind: str) -> None:
    till = Till()
    client = connect(till.app, headers={**KEY, "Content-Type": kind})
    body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n\x00\xff\r\n--b--\r\n'

    first = await client.post("/raw", content=body)
    retry = await client.post("/raw", content=body)
    other = await client.post("/raw", content=body + b"\r\n")

    assert retry.content == first.content == b'{"size":%d}' % len(body)
    assert other.status_code == 422


async def test_forms_and_files_count_as_the_request() -> None:
    pytest.importorskip("python_multipart", reason="FastAPI reads forms with python-multipart")
    till = Till()

    @till.app.post("/form")
    async def form(idem: Guard, amount: Annotated[int, Form()]) -> Any:
        found = await idem.check()
        return replayed(found) if found.is_duplicate else {"amount": amount}

    @till.app.post("/file")
    async def file(idem: Guard, file: Annotated[UploadFile, File()]) -> Any:
        found = await idem.check()
        return replayed(found) if found.is_duplicate else {"size": len(await file.read())}

    client = connect(till.app, headers=KEY)
    first, retry = [await client.post("/form", data={"amount": "1"}) for _ in range(2)]
    other = await client.post("/form", data={"amount": "2"})
    assert retry.content == first.content == b'{"amount":1}'
    assert is_replay(retry)
    assert other.status_code == 422

    whole = client.build_request("POST", "/file", files={"file": b"x" * 5000})
    first, retry = [await client.post("/file", content=whole.read(), headers=whole.headers) for _ in range(2)]
    assert retry.content == first.content == b'{"size":5000}'
    assert is_replay(retry)


async def test_background_tasks_run_once_and_see_the_operation_completed() -> None:
    till = Till()

    first, retry = await twice(till, "/background")

    assert till.runs == {"background": 1, "task": 1}
    assert is_replay(till.seen)
    assert till.seen.content == retry.content == first.content


@pytest.fixture
def keyed() -> FastAPI:
    app = FastAPI()

    @app.post("/payments")
    async def create_payment(key: Key) -> dict[str, str]:
        return {"key": key}

    install(app, Pipeline())
    return app


@pytest.mark.parametrize("sent", ["pay_1", '"pay_1"'])
async def test_a_required_key_is_handed_over_without_quotes(keyed: FastAPI, sent: str) -> None:
    response = await connect(keyed, headers={"Idempotency-Key": sent}).post("/payments")

    assert response.json() == {"key": "pay_1"}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "idempotency_key_missing"),
        ([b""], "idempotency_key_malformed"),
        ([b"a", b"b"], "idempotency_key_malformed"),
    ],
)
async def test_a_missing_or_malformed_key_is_refused_by_the_wire_table(
    keyed: FastAPI, headers: list[bytes], code: str
) -> None:
    sent = [(b"idempotency-key", value) for value in headers]
    plain = await Wire(upload()).run(keyed, http_scope("POST", "/payments", *sent))
    problem = http_scope("POST", "/payments", *sent, (b"accept", b"application/problem+json"))
    told = await Wire(upload()).run(keyed, problem)

    assert plain.status == told.status == 400
    assert list(json.loads(plain.body)) == ["detail"]
    assert json.loads(told.body)["code"] == code
    assert plain.headers["x-request-id"].startswith("req_")
    assert plain.headers["x-correlation-id"]


def unguarded(app: FastAPI) -> Any:
    return app


def without_a_core(app: FastAPI) -> Any:
    return ResilienceMiddleware(app, Pipeline(), core=False)


@pytest.mark.parametrize("door", [unguarded, without_a_core])
@pytest.mark.parametrize("dependency", [get_idempotency_guard, require_idempotency_key])
async def test_without_a_door_the_application_is_told_what_to_install(door: Any, dependency: Any) -> None:
    app = FastAPI()
    app.add_api_route("/", lambda: None, methods=["POST"], dependencies=[Depends(dependency)])

    with pytest.raises(ConfigurationError, match=rf"{dependency.__name__} .* install\(app, pipeline\)"):
        await Wire(upload()).run(door(app), http_scope("POST", "/", KEY_HEADER))


def added(app: FastAPI) -> None:
    app.add_middleware(ResilienceMiddleware, pipeline=Pipeline())


def context_alone(app: FastAPI) -> None:
    app.add_middleware(RequestContextMiddleware)


@pytest.mark.parametrize("door", [added, context_alone])
async def test_a_door_added_as_a_middleware_answers_for_the_guard(door: Callable[[FastAPI], None]) -> None:
    app = FastAPI()
    door(app)
    runs: list[None] = []

    @app.post("/payments")
    async def create_payment(idem: Guard, key: Key) -> Any:
        found = await idem.check()
        if found.is_duplicate:
            return replayed(found)
        runs.append(None)
        return {"key": key}

    client = connect(app, headers=KEY)

    assert (await connect(app).post("/payments")).status_code == 400
    first, retry = [await client.post("/payments") for _ in range(2)]
    assert is_replay(retry)
    assert retry.content == first.content
    assert len(runs) == 1
