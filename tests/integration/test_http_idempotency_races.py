import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from http_middleware import ResilienceMiddleware, install
from resilience import IdempotencyPolicy, MemoryStore, Pipeline
from resilience.testing import ManualClock
from tests.integration.http_driver import BOUND, Wire, connect, http_scope, is_last, upload, within

KEY = {"Idempotency-Key": "key_1"}
PROBLEM = {"Accept": "application/problem+json"}
KEY_HEADER = (b"idempotency-key", b"key_1")


class Workshop:
    """An application whose handlers wait where a test wants them to."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.runs = 0
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.app = FastAPI()
        for path, handler, status in (
            ("/work", self.work, 201),
            ("/quick", self.quick, 201),
            ("/background", self.background, 202),
            ("/failing-background", self.failing_background, 202),
            ("/broken", self.fail, 200),
            ("/unavailable", self.unavailable, 200),
            ("/stream", self.stream, 200),
            ("/endless", self.endless, 200),
        ):
            self.app.add_api_route(path, handler, methods=["POST"], status_code=status)
        install(self.app, Pipeline([IdempotencyPolicy(MemoryStore(clock=self.clock), **options)]))

    async def work(self) -> int:
        self.runs += 1
        self.started.set()
        await within(self.go_on.wait())
        return self.runs

    async def quick(self) -> int:
        self.runs += 1
        return self.runs

    async def background(self, tasks: BackgroundTasks) -> str:
        tasks.add_task(self.work)
        return "accepted"

    async def failing_background(self, tasks: BackgroundTasks) -> str:
        tasks.add_task(self.fail)
        return "accepted"

    async def fail(self) -> None:
        self.runs += 1
        raise RuntimeError("broken")

    async def unavailable(self) -> None:
        self.runs += 1
        raise HTTPException(503)

    async def stream(self, pieces: int = 1) -> Response:
        self.runs += 1

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(pieces):
                yield b"x" * 512

        return StreamingResponse(chunks())

    async def endless(self) -> Response:
        self.runs += 1

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.Event().wait()

        return StreamingResponse(chunks())


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get_list("x-idempotent-replayed") == ["true"]


def post(path: str, *, extensions: tuple[str, ...] = ()) -> Scope:
    return http_scope("POST", path, KEY_HEADER, extensions=extensions)


async def test_a_twin_of_a_running_request_is_told_when_to_come_back() -> None:
    workshop = Workshop()
    client = connect(workshop.app, headers={**KEY, **PROBLEM})
    first = asyncio.create_task(client.post("/work"))
    await within(workshop.started.wait())

    twin = await client.post("/work")
    workshop.go_on.set()

    assert (twin.status_code, twin.json()["code"]) == (409, "idempotency_in_progress")
    assert 1 <= int(twin.headers["retry-after"]) <= 5
    assert twin.json()["retry_after"] == int(twin.headers["retry-after"])
    assert (await first).status_code == 201
    assert workshop.runs == 1


async def test_a_twin_that_comes_back_after_the_first_has_ended_gets_its_reply() -> None:
    workshop = Workshop()
    client = connect(workshop.app, headers=KEY)
    first = asyncio.create_task(client.post("/work"))
    await within(workshop.started.wait())
    await client.post("/work")
    workshop.go_on.set()
    reply = await first

    retry = await client.post("/work")

    assert is_replay(retry)
    assert retry.content == reply.content


async def test_a_twin_with_another_payload_is_told_of_that_first() -> None:
    workshop = Workshop()
    client = connect(workshop.app, headers=KEY)
    first = asyncio.create_task(client.post("/work", content=b"one"))
    await within(workshop.started.wait())

    twin = await client.post("/work", content=b"two")
    workshop.go_on.set()
    await first

    assert twin.status_code == 422


async def test_of_fifty_identical_requests_at_once_one_runs() -> None:
    workshop = Workshop()
    client = connect(workshop.app, headers=KEY)
    tasks = [asyncio.create_task(client.post("/work", json={"a": 1})) for _ in range(50)]
    pending = set(tasks)
    async with asyncio.timeout(BOUND):
        while len(pending) > 1:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    workshop.go_on.set()

    statuses = sorted([response.status_code for response in await asyncio.gather(*tasks)])

    assert statuses == [201] + [409] * 49
    assert workshop.runs == 1


async def test_fifty_identical_retries_at_once_all_get_the_reply() -> None:
    workshop = Workshop()
    workshop.go_on.set()
    client = connect(workshop.app, headers=KEY)
    first = await client.post("/work")

    retries = await asyncio.gather(*(client.post("/work") for _ in range(50)))

    assert {retry.content for retry in retries} == {first.content}
    assert all(is_replay(retry) for retry in retries)
    assert workshop.runs == 1


async def test_different_keys_run_side_by_side() -> None:
    workshop = Workshop()
    client = connect(workshop.app)
    together = asyncio.Barrier(10)

    @workshop.app.post("/together")
    async def meet() -> None:
        await within(together.wait())

    responses = await asyncio.gather(
        *(client.post("/together", headers={"Idempotency-Key": f"key_{number}"}) for number in range(10))
    )

    assert {response.status_code for response in responses} == {200}


@pytest.mark.parametrize("path", ["/quick", "/stream", "/stream?pieces=3"])
async def test_a_reply_is_stored_before_its_last_byte_leaves(path: str) -> None:
    workshop = Workshop()
    retries: list[httpx.Response] = []
    route, _, query = path.partition("?")

    async def retry_first(message: Message) -> None:
        if is_last(message):
            retries.append(await connect(workshop.app, headers=KEY).post(path))

    scope = {**post(route), "query_string": query.encode()}
    wire = await Wire(upload(), on_send=retry_first).run(workshop.app, scope)

    assert [is_replay(retry) for retry in retries] == [True]
    assert retries[0].content == wire.body
    assert workshop.runs == 1


async def test_a_reply_is_not_stored_before_its_last_byte() -> None:
    workshop = Workshop()
    statuses: list[int] = []

    async def retry_first(message: Message) -> None:
        if not is_last(message):
            statuses.append((await connect(workshop.app, headers=KEY).post("/quick")).status_code)

    await Wire(upload(), on_send=retry_first).run(workshop.app, post("/quick"))

    assert statuses == [409]


@pytest.mark.parametrize("path", ["/unavailable", "/broken"])
async def test_the_key_of_an_answer_to_retry_is_free_before_its_last_byte_leaves(path: str) -> None:
    workshop = Workshop()
    statuses: list[int] = []

    async def retry_first(message: Message) -> None:
        if is_last(message) and not statuses:
            statuses.append((await connect(workshop.app, headers=KEY).post(path)).status_code)

    with contextlib.suppress(RuntimeError):  # the handler's own goes on to the server
        await Wire(upload(), on_send=retry_first).run(workshop.app, post(path))

    assert statuses != [409]
    assert workshop.runs == 2


async def test_a_retry_during_the_background_task_is_a_replay_and_the_task_runs_once() -> None:
    workshop = Workshop()
    client = connect(workshop.app, headers=KEY)
    first = asyncio.create_task(client.post("/background"))
    await within(workshop.started.wait())

    retry = await client.post("/background")
    workshop.go_on.set()

    assert is_replay(retry)
    assert retry.json() == (await first).json() == "accepted"
    assert workshop.runs == 1


async def test_a_background_task_starts_after_the_reply_has_left() -> None:
    workshop = Workshop()
    runs_at_the_end: list[int] = []

    async def look(message: Message) -> None:
        if is_last(message):
            runs_at_the_end.append(workshop.runs)

    workshop.go_on.set()
    await Wire(upload(), on_send=look).run(workshop.app, post("/background"))

    assert runs_at_the_end == [0]
    assert workshop.runs == 1


async def test_a_background_task_that_fails_does_not_take_the_reply_back() -> None:
    workshop = Workshop()
    client = connect(workshop.app, headers=KEY)
    await client.post("/failing-background")

    retry = await client.post("/failing-background")

    assert is_replay(retry)
    assert workshop.runs == 1


async def test_a_streamed_reply_within_the_bound_is_replayed_whole() -> None:
    workshop = Workshop(max_reply=1024)
    client = connect(workshop.app, headers=KEY)
    await client.post("/stream?pieces=2")

    retry = await client.post("/stream?pieces=2")

    assert is_replay(retry)
    assert retry.content == b"x" * 1024


async def test_a_streamed_reply_over_the_bound_passes_whole_and_never_runs_again() -> None:
    workshop = Workshop(max_reply=1024)
    client = connect(workshop.app, headers={**KEY, **PROBLEM})

    first = await client.post("/stream?pieces=10")
    retry = await client.post("/stream?pieces=10")

    assert (first.status_code, first.content) == (200, b"x" * 5120)
    assert (retry.status_code, retry.json()["code"]) == (409, "idempotency_not_replayable")
    assert "retry-after" not in retry.headers
    assert workshop.runs == 1


async def test_a_reply_that_grows_over_the_bound_again_after_a_large_piece_is_not_kept_in_part() -> None:
    async def uneven(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"x" * 100, b"y"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    guarded = ResilienceMiddleware(uneven, Pipeline([IdempotencyPolicy(MemoryStore(), max_reply=50)]))
    first = await Wire(upload()).run(guarded, post("/"))

    retry = await Wire(upload()).run(guarded, post("/"))

    assert first.body == b"x" * 100 + b"y"
    assert retry.status == 409


async def test_a_stream_that_breaks_off_is_not_replayed_as_if_it_were_whole() -> None:
    async def breaks(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("broken")

    guarded = ResilienceMiddleware(breaks, Pipeline([IdempotencyPolicy(MemoryStore())]))

    with pytest.raises(RuntimeError):
        await Wire(upload()).run(guarded, post("/"))

    retry = Wire(upload())
    with contextlib.suppress(RuntimeError):
        await retry.run(guarded, post("/"))

    assert "x-idempotent-replayed" not in retry.headers


async def test_a_request_that_is_cut_off_keeps_its_key_until_the_lease_is_out() -> None:
    workshop = Workshop(lease=30)
    client = connect(workshop.app, headers=KEY)
    first = asyncio.create_task(Wire(upload()).run(workshop.app, post("/work")))
    await within(workshop.started.wait())
    first.cancel()
    await asyncio.wait([first])
    workshop.go_on.set()

    assert (await client.post("/work")).status_code == 409
    workshop.clock.advance(31)
    assert (await client.post("/work")).status_code == 201
    assert workshop.runs == 2


async def test_an_operation_that_was_cut_off_is_not_run_again_where_the_policy_refuses_to() -> None:
    workshop = Workshop(lease=30, takeover="refuse")
    first = asyncio.create_task(Wire(upload()).run(workshop.app, post("/work")))
    await within(workshop.started.wait())
    first.cancel()
    await asyncio.wait([first])
    workshop.clock.advance(31)

    retry = await connect(workshop.app, headers={**KEY, **PROBLEM}).post("/work")

    assert (retry.status_code, retry.json()["code"]) == (409, "idempotency_abandoned")
    assert workshop.runs == 1


@pytest.mark.parametrize(
    "announcement",
    [
        {"type": "http.response.push", "path": "/style.css", "headers": []},
        {"type": "http.response.early_hint", "links": [b"</style.css>; rel=preload"]},
        {"type": "http.response.debug", "info": {}},
    ],
    ids=["push", "early hint", "debug"],
)
async def test_what_is_announced_before_a_reply_does_not_end_it(announcement: Message) -> None:
    runs: list[str] = []

    async def announces(scope: Scope, receive: Receive, send: Send) -> None:
        runs.append(scope["path"])
        await send(announcement)
        await JSONResponse({"done": True})(scope, receive, send)

    guarded = ResilienceMiddleware(announces, Pipeline([IdempotencyPolicy(MemoryStore())]))
    first = await Wire(upload()).run(guarded, post("/", extensions=(announcement["type"],)))

    retry = await Wire(upload()).run(guarded, post("/", extensions=(announcement["type"],)))

    assert runs == ["/"]
    assert retry.headers["x-idempotent-replayed"] == "true"
    assert retry.body == first.body


async def test_a_file_that_the_server_sends_itself_is_protected_and_not_replayable() -> None:
    runs: list[str] = []

    async def sends_file(scope: Scope, _receive: Receive, send: Send) -> None:
        runs.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/srv/file"})

    guarded = ResilienceMiddleware(sends_file, Pipeline([IdempotencyPolicy(MemoryStore())]))
    first = await Wire(upload()).run(guarded, post("/"))

    retry = await Wire(upload()).run(guarded, post("/"))

    assert first.sent[1] == {"type": "http.response.pathsend", "path": "/srv/file"}
    assert retry.status == 409
    assert runs == ["/"]


async def test_trailers_pass_and_the_reply_is_replayed_without_them() -> None:
    runs: list[str] = []

    async def sends_trailers(scope: Scope, _receive: Receive, send: Send) -> None:
        runs.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"body", "more_body": False})
        await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": False})

    guarded = ResilienceMiddleware(sends_trailers, Pipeline([IdempotencyPolicy(MemoryStore())]))
    first = await Wire(upload()).run(guarded, post("/"))

    retry = await Wire(upload()).run(guarded, post("/"))

    assert first.sent[-1]["type"] == "http.response.trailers"
    assert (retry.status, retry.body) == (200, b"body")
    assert runs == ["/"]


async def test_a_client_that_hangs_up_in_the_reply_does_not_make_a_retry_run_again() -> None:
    workshop = Workshop()
    await Wire([*upload(), {"type": "http.disconnect"}]).run(workshop.app, post("/endless"))

    await Wire([*upload(), {"type": "http.disconnect"}]).run(workshop.app, post("/endless"))

    assert workshop.runs == 1


async def test_a_send_that_fails_in_the_reply_does_not_make_a_retry_run_again() -> None:
    workshop = Workshop()

    async def hung_up(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("The client is gone.")

    scope = post("/stream")
    scope["asgi"]["spec_version"] = "2.4"  # from which on a server tells of a hang-up by an OSError
    with contextlib.suppress(ClientDisconnect):
        await Wire(upload(), on_send=hung_up).run(workshop.app, scope)

    await connect(workshop.app, headers=KEY).post("/stream")

    assert workshop.runs == 1


async def test_keyed_requests_at_once_each_get_their_own_body() -> None:
    workshop = Workshop()
    bodies: list[bytes] = []

    @workshop.app.post("/echo")
    async def echo(request: Request) -> None:
        bodies.append(await request.body())

    client = connect(workshop.app)
    await asyncio.gather(
        *(
            client.post("/echo", content=f"{number}".encode(), headers={"Idempotency-Key": f"key_{number}"})
            for number in range(20)
        )
    )

    assert sorted(bodies) == sorted(f"{number}".encode() for number in range(20))
