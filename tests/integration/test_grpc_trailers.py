"""Trailers of the handler and ours arrive together, whatever ends the call; of a name in both, the handler's."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from resilience import MemoryStore, RateLimitPolicy
from tests.integration.grpc_world import (
    GO,
    STYLES,
    Act,
    Pair,
    Style,
    Told,
    aborts,
    ask,
    crashes,
    leaks,
    ok,
    serving,
    sets_code,
)

StatusCode = grpc.StatusCode
each_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)

APP: tuple[Pair, ...] = (("x-app", "one"), ("x-app", "two"), ("x-app-bin", b"\x00\xff"))


def after(set_trailers: Callable[[Any], None], act: Act) -> Act:
    async def both(context: Any) -> bytes:
        set_trailers(context)
        return await act(context)

    return both


async def outcome(act: Act, style: Style = STYLES["unary_unary"]) -> Told:
    async with serving(style.make(act), RateLimitPolicy(MemoryStore(), "100/minute")) as channel:
        return await ask(channel, GO, style.kind)


def theirs(end: Told) -> list[Pair]:
    return [pair for pair in end.trailers if pair[0].startswith("x-app")]


@pytest.mark.parametrize("act", [ok, aborts, crashes, sets_code, leaks], ids=lambda act: act.__name__)
@each_style
async def test_trailers_that_the_handler_set_arrive_beside_ours(style: Style, act: Act) -> None:
    end = await outcome(after(lambda context: context.set_trailing_metadata(APP), act), style)
    assert theirs(end) == list(APP)
    assert end.get("x-request-id")
    assert end.get("x-ratelimit-remaining") == "99"


@each_style
async def test_trailers_of_an_abort_arrive_beside_ours(style: Style) -> None:
    async def act(context: Any) -> bytes:
        await context.abort(StatusCode.NOT_FOUND, "Gone", APP)
        return b""

    end = await outcome(act, style)
    assert (end.code, end.details, theirs(end)) == (StatusCode.NOT_FOUND, "Gone", list(APP))
    assert end.get("x-request-id")
    assert end.get("x-ratelimit-remaining") == "99"


async def test_an_abort_adds_to_trailers_set_before_and_replaces_equal_names() -> None:
    async def act(context: Any) -> bytes:
        context.set_trailing_metadata((("x-app-kept", "set"), ("x-app-why", "set")))
        await context.abort(StatusCode.NOT_FOUND, "Gone", (("x-app-why", "abort"),))
        return b""

    end = await outcome(act)
    assert theirs(end) == [("x-app-kept", "set"), ("x-app-why", "abort")]


def abort_with(trailers: Any) -> Act:
    async def act(context: Any) -> bytes:
        await context.abort(StatusCode.NOT_FOUND, "Gone", trailers)
        return b""

    return act


def return_with(trailers: Any) -> Act:
    async def act(context: Any) -> bytes:
        context.set_trailing_metadata(trailers)
        return b"done"

    return act


@pytest.mark.parametrize(
    "form", [tuple, list, lambda pairs: grpc.aio.Metadata(*pairs)], ids=["tuple", "list", "Metadata"]
)
@pytest.mark.parametrize(("make", "code"), [(abort_with, StatusCode.NOT_FOUND), (return_with, StatusCode.OK)])
async def test_trailers_may_be_a_tuple_a_list_or_a_metadata(
    form: Callable[[tuple[Pair, ...]], Any], make: Callable[[Any], Act], code: grpc.StatusCode
) -> None:
    end = await outcome(make(form(APP)))
    assert (end.code, theirs(end)) == (code, list(APP))


@pytest.mark.parametrize("make", [abort_with, return_with])
async def test_the_handlers_value_of_a_name_of_ours_wins(make: Callable[[Any], Act]) -> None:
    end = await outcome(make((("x-request-id", "mine"), ("x-ratelimit-limit", "7"))))
    assert (end.get("x-request-id"), end.get("x-ratelimit-limit")) == ("mine", "7")
    assert end.get("x-correlation-id")


async def test_trailers_set_twice_are_the_last_ones_and_ours() -> None:
    async def act(context: Any) -> bytes:
        context.set_trailing_metadata((("x-app-first", "1"),))
        context.set_trailing_metadata((("x-app-second", "2"),))
        return b"done"

    end = await outcome(act)
    assert theirs(end) == [("x-app-second", "2")]
    assert end.get("x-request-id")


async def test_the_handler_reads_back_what_it_told() -> None:
    seen: list[object] = []

    async def act(context: Any) -> bytes:
        seen.extend((context.code(), context.details(), context.trailing_metadata()))
        context.set_trailing_metadata(APP)
        context.set_code(StatusCode.NOT_FOUND)
        context.set_details("Gone")
        seen.extend((context.code(), context.details(), context.trailing_metadata()))
        return b""

    await outcome(act)
    assert seen == [None, "", (), StatusCode.NOT_FOUND, "Gone", APP]


class Rich(grpc.Status):
    code = StatusCode.FAILED_PRECONDITION
    details = "Rich"
    trailing_metadata = (("grpc-status-details-bin", b"\x08\x09\xff"),)


async def test_an_abort_with_a_rich_status_arrives_whole_beside_ours() -> None:
    async def act(context: Any) -> bytes:
        context.set_trailing_metadata(APP)
        await context.abort_with_status(Rich())
        return b""

    end = await outcome(act)
    assert (end.code, end.details, theirs(end)) == (StatusCode.FAILED_PRECONDITION, "Rich", list(APP))
    assert end.get_all("grpc-status-details-bin") == [b"\x08\x09\xff"]
    assert end.get("x-request-id")


async def test_initial_metadata_of_the_handler_arrives_and_none_of_ours() -> None:
    async def act(context: Any) -> bytes:
        await context.send_initial_metadata((("x-app-initial", "1"),))
        return b"done"

    end = await outcome(act)
    assert (end.code, end.initial) == (StatusCode.OK, [("x-app-initial", "1")])


async def test_a_done_callback_gets_the_context_that_the_handler_saw() -> None:
    seen: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def act(context: Any) -> bytes:
        context.add_done_callback(lambda other: seen.set_result(other is context))
        return b"done"

    async with serving(STYLES["unary_unary"].make(act)) as channel:
        await ask(channel)
        assert await seen
