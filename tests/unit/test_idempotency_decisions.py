from dataclasses import replace
from itertools import product
from typing import Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.decisions.idempotency import (
    LONGEST_HINT,
    Abandoned,
    Claimed,
    Completed,
    Expired,
    InProgress,
    Mismatched,
    Takeover,
    accept_key,
    decide_claim,
    decide_step,
    differs,
    record_key,
)
from resilience.decisions.idempotency_record import (
    Record,
    Standing,
    claimed,
    completed,
    next_epoch,
    released,
    resolution,
    stand,
    state_of,
)
from resilience.decisions.idempotency_table import LAPSES, ROWS, Command, Row, State, find_row
from resilience.verdict import Reply

PRINT, OTHER_PRINT, FOREIGN_PRINT = b"http:1", b"http:2", b"grpc:3"
REPLY = Reply("http", 201, (("a", "b"),), b"{}")
TAKEOVERS: tuple[Takeover, ...] = ("reexecute", "refuse")


def running(lease_until: float = 30.0, epoch: int = 1) -> Record:
    return Record("owner", epoch, PRINT, lease_until)


def done(reply: Reply | None = REPLY, ttl_until: float = 100.0) -> Record:
    return Record("owner", 1, PRINT, 30.0, done=True, reply=reply, ttl_until=ttl_until)


RECORDS: dict[State, Record | None] = {
    "absent": None,
    "in_progress": running(),
    "abandoned": running(lease_until=-1.0),
    "completed": done(),
    "expired": done(ttl_until=-1.0),
    "released": released(running(epoch=2), 0.0),
}


@pytest.mark.parametrize(
    "key", ["k", "a" * 255, "8e03978e-40d5-43dd-bc93-6894a57f9324", "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"]
)
def test_a_key_is_accepted_bare_and_quoted_and_means_the_same(key: str) -> None:
    assert accept_key([key]) == key
    assert accept_key([f'"{key}"']) == key


@pytest.mark.parametrize(
    "value",
    [
        "",
        '""',
        "a" * 256,
        "a" * 300,
        '"' + "a" * 256 + '"',
        "a b",
        "a\n",
        "\x00",
        "a\x7f",
        "é",
        'a"b',
        "a\\b",
        '"a',
        'a"',
    ],
)
def test_a_malformed_key_is_refused(value: str) -> None:
    assert accept_key([value]) is None


@pytest.mark.parametrize("values", [[], ["a", "a"], ["a", "b"]])
def test_a_key_is_sent_once(values: list[str]) -> None:
    assert accept_key(values) is None


def test_a_record_key_is_64_hex_digits_whatever_its_parts_hold() -> None:
    for part in ("", "a", "\ud800", "x" * 10_000):
        key = record_key(part, part, part, part)
        assert len(key) == 64
        assert set(key) <= set("0123456789abcdef")


def test_no_two_record_keys_are_equal_unless_every_part_is() -> None:
    parts = [
        ("n", "o", "c", "k"),
        ("no", "", "c", "k"),
        ("", "no", "c", "k"),
        ("n", "oc", "", "k"),
        ("n", "o", "ck", ""),
    ]
    parts += [("n", "o", "c", "K"), ("n", "o", "C", "k"), ("n", "O", "c", "k"), ("N", "o", "c", "k")]
    assert len({record_key(*part) for part in parts}) == len(parts)
    assert record_key("n", "o", "c", "k") == record_key("n", "o", "c", "k")


@pytest.mark.parametrize("takeover", TAKEOVERS)
def test_a_free_key_is_granted_as_the_first(takeover: Takeover) -> None:
    assert decide_claim(None, "new", PRINT, takeover, 30.0, 0.0) == Claimed(1)


@pytest.mark.parametrize("takeover", TAKEOVERS)
@pytest.mark.parametrize("token", ["owner", "new"])
@pytest.mark.parametrize("print_", [PRINT, OTHER_PRINT, FOREIGN_PRINT])
def test_a_released_key_is_granted_to_anyone_with_a_higher_epoch(print_: bytes, token: str, takeover: Takeover) -> None:
    record = released(running(epoch=2), 0.0)
    assert decide_claim(record, token, print_, takeover, 30.0, 0.0) == Claimed(3)


@pytest.mark.parametrize("takeover", TAKEOVERS)
@pytest.mark.parametrize("token", ["owner", "new"])
@pytest.mark.parametrize("record", [running(), running(lease_until=-1.0), done(), done(ttl_until=-1.0)])
def test_a_mismatch_is_told_before_everything_else(record: Record, token: str, takeover: Takeover) -> None:
    assert decide_claim(record, token, OTHER_PRINT, takeover, 30.0, 0.0) == Mismatched()


@pytest.mark.parametrize("token", ["owner", "new"])
@pytest.mark.parametrize("reply", [REPLY, None])
def test_a_finished_key_answers_what_was_kept(reply: Reply | None, token: str) -> None:
    assert decide_claim(done(reply), token, PRINT, "refuse", 30.0, 99.0) == Completed(reply)


@pytest.mark.parametrize("now", [0.0, 30.0, 99.0])
def test_the_owner_is_granted_again_with_its_epoch(now: float) -> None:
    assert decide_claim(running(epoch=3), "owner", PRINT, "refuse", 30.0, now) == Claimed(3)


def test_a_twin_is_asked_to_wait_for_the_rest_of_the_lease() -> None:
    assert decide_claim(running(), "twin", PRINT, "reexecute", 30.0, 28.0) == InProgress(2.0)


def test_a_twin_is_never_asked_to_wait_long() -> None:
    assert decide_claim(running(), "twin", PRINT, "reexecute", 30.0, 0.0) == InProgress(LONGEST_HINT)
    assert decide_claim(running(), "twin", PRINT, "reexecute", 1.0, 0.0) == InProgress(1.0)


def test_a_lease_ends_at_its_instant() -> None:
    assert isinstance(decide_claim(running(), "twin", PRINT, "reexecute", 30.0, 29.999), InProgress)
    assert decide_claim(running(epoch=4), "twin", PRINT, "reexecute", 30.0, 30.0) == Claimed(5)
    assert decide_claim(running(epoch=4), "twin", PRINT, "refuse", 30.0, 30.0) == Abandoned()


def test_another_doors_payload_is_no_mismatch() -> None:
    assert isinstance(decide_claim(running(), "twin", FOREIGN_PRINT, "reexecute", 30.0, 0.0), InProgress)
    assert decide_claim(done(), "twin", FOREIGN_PRINT, "reexecute", 30.0, 0.0) == Completed(REPLY)


@pytest.mark.parametrize("token", ["owner", "new"])
@pytest.mark.parametrize("takeover", TAKEOVERS)
def test_a_tombstone_answers_after_the_ttl_and_not_before(token: str, takeover: Takeover) -> None:
    record = done(ttl_until=60.0)
    assert decide_claim(record, token, PRINT, takeover, 30.0, 59.999) == Completed(REPLY)
    assert decide_claim(record, token, PRINT, takeover, 30.0, 60.0) == Expired()


def test_a_granted_claim_is_a_running_record_with_a_lease() -> None:
    record = claimed("owner", 2, PRINT, lease=30.0, ttl=60.0, now=5.0)
    assert record == Record("owner", 2, PRINT, 35.0, done=False, reply=None, written_at=5.0, ttl_until=65.0)


def test_an_accepted_completion_is_a_done_record_with_a_ttl() -> None:
    record = completed("owner", 2, PRINT, REPLY, ttl=60.0, now=5.0)
    assert record == Record("owner", 2, PRINT, 5.0, done=True, reply=REPLY, written_at=5.0, ttl_until=65.0)


def test_a_release_leaves_nothing_but_the_epoch_for_one_more_ttl() -> None:
    left = released(claimed("owner", 2, PRINT, lease=30.0, ttl=60.0, now=5.0), 25.0)
    assert left == Record("owner", 2, b"", 85.0, written_at=25.0, ttl_until=85.0, released=True)


@pytest.mark.parametrize(("epoch", "then"), [(1, "absent"), (2, "released"), (9, "released")])
def test_only_a_release_after_a_takeover_leaves_something(epoch: int, then: State) -> None:
    for record in (running(epoch=epoch), running(lease_until=-1.0, epoch=epoch)):
        assert decide_step("release", record, "owner", 0.0).then == then


# -- the table

COMMANDS: tuple[Command, ...] = get_args(Command)
STATES: tuple[State, ...] = get_args(State)
CELLS = list(product(COMMANDS, STATES, (True, False), (True, False), TAKEOVERS, (True, False)))
Cell = tuple[Command, State, bool, bool, Takeover, bool]


def holds(row: Row, command: Command, state: State, owner: bool, same: bool, takeover: Takeover, later: bool) -> bool:
    return (
        row.command == command
        and state in row.states
        and row.by in ("any", "owner" if owner else "other")
        and row.payload in ("any", "same" if same else "other")
        and row.takeover in ("any", takeover)
        and row.turn in ("any", "later" if later else "first")
    )


@pytest.mark.parametrize("cell", CELLS)
def test_exactly_one_row_holds(cell: Cell) -> None:
    command, state, owner, same, takeover, later = cell
    found = [row for row in ROWS if holds(row, *cell)]
    assert found == [find_row(command, state, owner=owner, same_payload=same, takeover=takeover, later=later)]


def test_every_row_and_every_lapse_has_a_name_and_a_reason_of_its_own() -> None:
    named = [each.name for each in (*ROWS, *LAPSES)]
    assert len(set(named)) == len(named) == len([each for each in (*ROWS, *LAPSES) if each.why])
    assert {state for row in ROWS for state in row.states} == set(STATES)


def test_a_claim_is_never_answered_with_yes_or_no_and_nothing_else_is_answered_otherwise() -> None:
    for row in ROWS:
        assert (row.answer in ("yes", "no")) is (row.command != "claim")
        assert row.answer != "no" or row.then is None


def test_only_an_absent_record_begins_with_the_first_epoch() -> None:
    for row in ROWS:
        assert (row.epoch == "first") is (row.states == ("absent",) and row.then is not None)
        assert row.epoch != "raised" or row.then is not None


def test_no_command_but_an_operators_lets_an_epoch_come_again_after_a_takeover() -> None:
    for row in ROWS:
        assert row.then != "absent" or row.command == "forget" or row.turn == "first"
        assert row.then != "released" or row.epoch == "kept"
        assert row.answer != "claimed" or row.states != ("released",) or row.epoch == "raised"


def test_no_claim_runs_while_another_owner_lives_or_after_the_operation_is_done() -> None:
    for row in ROWS:
        if row.answer == "claimed" and row.by != "owner":
            assert set(row.states) <= {"absent", "abandoned", "released"}
        assert row.answer != "claimed" or not {"completed", "expired"} & set(row.states)


def test_nobody_but_the_owner_changes_the_record_of_a_live_owner() -> None:
    for row in ROWS:
        assert row.by == "owner" or row.then is None or "in_progress" not in row.states


@pytest.mark.parametrize("cell", CELLS)
def test_the_functions_answer_what_the_table_says(cell: Cell) -> None:
    command, state, owner, same, takeover, later = cell
    record, token = RECORDS[state], "owner" if owner else "other"
    if record is not None:
        record = replace(record, epoch=2 if later else 1)
    row = find_row(
        command, state, owner=owner and record is not None, same_payload=same, takeover=takeover,
        later=later and record is not None,
    )  # fmt: skip
    if command != "claim":
        assert decide_step(command, record, token, 0.0) == row
        return
    answer = decide_claim(record, token, PRINT if same or record is None else OTHER_PRINT, takeover, 30.0, 0.0)
    epoch = next_epoch(row, record)
    expected = {
        "claimed": Claimed(epoch),
        "in_progress": InProgress(LONGEST_HINT),
        "completed": Completed(REPLY),
        "mismatched": Mismatched(),
        "abandoned": Abandoned(),
        "expired": Expired(),
    }
    assert answer == expected[row.answer if record is not None else "claimed"]


@pytest.mark.parametrize(
    ("name", "epoch"),
    [
        ("takeover", 5),
        ("resolution", 5),
        ("claim after a release", 5),
        ("renewal", 4),
        ("completion", 4),
        ("completion after a release", 4),
    ],
)
def test_a_new_owner_raises_the_epoch_and_an_old_one_keeps_it(name: str, epoch: int) -> None:
    row = next(row for row in ROWS if row.name == name)
    assert next_epoch(row, running(epoch=4)) == epoch


@given(
    st.sampled_from(("runs", "done", "released")), st.floats(0, 10), st.floats(0, 20), st.floats(0, 10),
    st.lists(st.floats(0, 15), max_size=8),
)  # fmt: skip
def test_time_alone_leads_along_the_lapses(
    end: Literal["runs", "done", "released"], lease: float, more: float, tombstone: float, pauses: list[float]
) -> None:
    ttl = lease + more
    record = claimed("t", 1, PRINT, lease=lease, ttl=ttl, now=0.0)
    gone_at = ttl
    if end == "released":
        record = released(record, 0.0)
    elif end == "done":
        record = completed("t", 1, PRINT, REPLY, ttl=ttl, now=0.0)
        gone_at = ttl + tombstone
    now, before = 0.0, state_of(record, 0.0)
    for pause in pauses:
        now += pause
        state = state_of(record if now < gone_at else None, now)
        ways = {before}
        while grown := {lapse.then for lapse in LAPSES if lapse.state in ways} - ways:
            ways |= grown
        assert state in ways
        before = state


# -- what an operator sees and says


def test_an_operator_sees_that_a_key_was_given_back() -> None:
    record = released(claimed("owner", 2, PRINT, lease=30.0, ttl=60.0, now=90.0), 100.0)
    assert stand(record, 160.0, 110.0) == Standing("released", 2, 10.0, 0.0, 50.0, 0.0, None)


def test_an_operator_sees_what_a_running_record_has_left() -> None:
    record = claimed("owner", 2, PRINT, lease=30.0, ttl=60.0, now=100.0)
    assert stand(record, 160.0, 110.0) == Standing("in_progress", 2, 10.0, 20.0, 50.0, 0.0, None)
    assert stand(record, 160.0, 130.0) == Standing("abandoned", 2, 30.0, 0.0, 30.0, 0.0, None)


def test_an_operator_sees_the_reply_until_it_is_a_tombstone() -> None:
    record = completed("owner", 1, PRINT, REPLY, ttl=60.0, now=100.0)
    assert stand(record, 190.0, 110.0) == Standing("completed", 1, 10.0, 0.0, 50.0, 30.0, REPLY)
    assert stand(record, 190.0, 170.0) == Standing("expired", 1, 70.0, 0.0, 0.0, 20.0, None)


def test_the_same_resolution_has_the_same_token_and_no_other_has() -> None:
    replies = [
        None,
        REPLY,
        Reply("grpc", 201, (("a", "b"),), b"{}"),
        Reply("http", 200, (("a", "b"),), b"{}"),
        Reply("http", 201, (("a", "c"),), b"{}"),
        Reply("http", 201, (("a", "b"), ("a", "b")), b"{}"),
        Reply("http", 201, (("a", "b"),), b"{} "),
        Reply("http", 201, (("a", "\ud800"),), b"{}"),
    ]
    assert len({resolution(reply) for reply in replies}) == len(replies)
    assert resolution(REPLY) == resolution(Reply("http", 201, (("a", "b"),), b"{}"))


def test_fingerprints_differ_within_one_door_only() -> None:
    assert differs(PRINT, OTHER_PRINT)
    assert not differs(PRINT, PRINT)
    assert not differs(PRINT, FOREIGN_PRINT)
