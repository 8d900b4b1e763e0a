"""The checker of recorded histories finds what must not be, and nothing else."""

from math import inf

import pytest

from tests.faults.idempotency_history import Asked, Fault, History, Run, violations

LEASE = 1.0
KEY = "alice/k"
A = Run(KEY, "A", 1, "one", "1", began=1.0, ended=2.0)
B = Run(KEY, "B", 2, "two", "2", began=5.0, ended=6.0)
OWN = Asked(KEY, "1", 0.9, 2.1, "ran", "A", b"A")
HEIRS = Asked(KEY, "2", 4.0, 6.1, "ran", "B", b"B")
STALLED = Fault("one", 1.5, 5.5)
KILLED = Fault("one", 1.5, inf)
FROZEN = Fault(None, 1.5, 3.5)


def replay(op: str, at: float, run: str = "A", reply: bytes = b"") -> Asked:
    return Asked(KEY, op, at, at + 0.1, "replayed", run, reply or run.encode())


def found(runs: list[Run], asked: list[Asked], *faults: Fault) -> list[str]:
    return violations(History(runs, asked, faults), lease=LEASE)


def test_a_run_its_twins_and_its_replays_are_fine() -> None:
    twin = Asked(KEY, "3", 1.5, 1.6, "waiting")
    waited = Asked(KEY, "4", 1.5, 2.2, "replayed", "A", b"A")
    gone = Asked(KEY, "5", 4.0, 4.1, "refused")
    lost = Asked(KEY, "6", 4.0, inf, "unknown")
    assert found([A], [OWN, twin, waited, gone, lost, replay("7", 5.0)]) == []


def test_nothing_at_all_is_fine() -> None:
    assert found([], []) == []


@pytest.mark.parametrize("fault", [STALLED, KILLED, FROZEN])
def test_a_takeover_with_a_cause_is_fine(fault: Fault) -> None:
    lost = Asked(KEY, "1", 0.9, inf, "unknown")
    dead = A._replace(ended=inf)
    assert found([dead, B], [lost, HEIRS, replay("3", 7.0, "B")], fault) == []


def test_a_stalled_owner_may_tell_its_own_client_its_own_reply() -> None:
    woken, own = A._replace(ended=5.6), OWN._replace(until=7.0)
    assert found([woken, B], [own, HEIRS, replay("3", 7.0, "B")], STALLED) == []


def test_an_owner_that_stood_still_before_its_first_line_may_start_late() -> None:
    late, own = A._replace(began=5.6, ended=5.7), OWN._replace(until=7.0)
    stalled = Fault("one", 0.95, 5.5)
    assert found([late, B], [own, HEIRS, replay("3", 7.0, "B")], stalled) == []


def test_the_next_run_after_a_first_that_failed_may_be_the_first_again() -> None:
    failed, told = A._replace(failed=True), OWN._replace(told="failed", run="", reply=b"")
    assert found([failed, B._replace(epoch=1)], [told, HEIRS, replay("3", 7.0, "B")]) == []


def test_the_next_run_after_a_successor_that_failed_needs_no_other_cause() -> None:
    failed, third = B._replace(failed=True), Run(KEY, "C", 3, "two", "3", began=6.1, ended=6.2)
    told = [HEIRS._replace(told="failed", run="", reply=b""), Asked(KEY, "3", 6.0, 6.3, "ran", "C", b"C")]
    assert found([A._replace(ended=7.0), failed, third], [OWN._replace(until=7.1), *told], STALLED) == []


def test_a_stalled_owners_reply_may_be_kept_once_its_successor_has_failed() -> None:
    woken, own = A._replace(ended=6.6), OWN._replace(until=7.0)
    told = HEIRS._replace(told="failed", run="", reply=b"")
    assert found([woken, B._replace(failed=True)], [own, told, replay("3", 8.0)], STALLED) == []


def test_keys_are_judged_apart() -> None:
    other = A._replace(key="bob/k", run="C", op="9")
    assert found([A, other], [OWN]) == []


def test_two_runs_of_one_epoch_are_found() -> None:
    assert found([A, B._replace(epoch=1)], [OWN, HEIRS], STALLED) == [f"{KEY}: runs A and B both have epoch 1"]


def test_a_run_of_an_epoch_whose_run_fails_only_later_is_found() -> None:
    failing = A._replace(ended=9.0, failed=True)
    assert f"{KEY}: runs A and B both have epoch 1" in found([failing, B._replace(epoch=1)], [HEIRS], STALLED)


def test_epochs_that_begin_again_after_a_successor_failed_are_found() -> None:
    woken, failed = A._replace(ended=9.0), B._replace(failed=True)
    third = Run(KEY, "C", 1, "two", "3", began=6.1, ended=6.2)
    told = found([woken, failed, third], [OWN._replace(until=9.1)], STALLED)
    assert f"{KEY}: runs A and C both have epoch 1" in told
    assert f"{KEY}: run C of epoch 1 began after one of epoch 2" in told


def test_a_second_run_of_a_later_epoch_is_found_though_the_first_failed() -> None:
    first, second = A._replace(epoch=2, failed=True), B._replace(epoch=2)
    assert f"{KEY}: runs A and B both have epoch 2" in found([first, second], [HEIRS], STALLED)


def test_epochs_that_fall_are_found() -> None:
    first, second = A._replace(epoch=2), B._replace(epoch=1)
    assert any("began after one of epoch 2" in text for text in found([first, second], [OWN, HEIRS], FROZEN))


@pytest.mark.parametrize(
    "faults", [(), (Fault("two", 1.5, 5.5),), (Fault("one", 0.1, 0.5),), (Fault("one", 7.0, inf),)]
)
def test_a_takeover_from_the_living_is_found(faults: tuple[Fault, ...]) -> None:
    running = A._replace(ended=9.0)
    assert found([running, B], [HEIRS], *faults) == [
        f"{KEY}: run B took over from A, whose process and store were well"
    ]


def test_a_takeover_before_the_lease_was_out_is_found() -> None:
    hasty = B._replace(began=1.7)
    assert found([A._replace(ended=inf), hasty], [HEIRS], KILLED) == [
        f"{KEY}: run B took over from A before its lease was out"
    ]


def test_a_second_run_after_an_answer_is_found_though_there_was_a_fault_later() -> None:
    """As where a store says that it keeps replies, and does not."""
    later = Fault("one", 3.0, inf)
    assert found([A, B], [OWN, HEIRS], later) == [f"{KEY}: run B took over from A, whose process and store were well"]


def test_two_different_replays_are_found() -> None:
    own = OWN._replace(until=7.0)
    told = found([A._replace(ended=5.6), B], [own, HEIRS, replay("3", 7.0, "B"), replay("4", 7.0, "A")], STALLED)
    assert f"{KEY}: calls 3 and 4 were replayed different replies" in told


def test_a_replay_that_is_not_the_reply_byte_for_byte_is_found() -> None:
    assert found([A], [OWN, replay("3", 3.0, reply=b"a")]) == [f"{KEY}: the replay of A is not its reply"]


def test_a_stalled_owner_that_overwrote_the_winner_is_found() -> None:
    woken, own = A._replace(ended=5.6), OWN._replace(until=7.0)
    assert found([woken, B], [own, HEIRS, replay("3", 8.0, "A")], STALLED) == [
        f"{KEY}: the reply of epoch 1 is kept, though epoch 2 had been granted"
    ]


def test_a_run_after_completion_is_found() -> None:
    """As where the record was lost, or freed by one who did not own it."""
    again = Run(KEY, "C", 1, "two", "9", began=5.0, ended=6.0)
    told = found([A, again], [OWN, replay("3", 3.0), Asked(KEY, "9", 4.9, 6.1, "ran", "C", b"C")], STALLED)
    assert f"{KEY}: runs A and C both have epoch 1" in told
    assert f"{KEY}: call 9 was ran after the key was done" in told
    assert f"{KEY}: run C began after the key was done" in told


def test_a_run_after_completion_is_found_though_its_answer_was_lost() -> None:
    told = found([A, B], [OWN, replay("3", 3.0), Asked(KEY, "2", 4.0, inf, "unknown")], STALLED)
    assert f"{KEY}: run B began after the key was done" in told


def test_a_done_key_that_is_in_progress_again_is_found() -> None:
    """As where a heartbeat writes over what was completed."""
    assert found([A], [OWN, replay("3", 3.0), Asked(KEY, "4", 4.0, 4.1, "waiting")]) == [
        f"{KEY}: call 4 was waiting after the key was done"
    ]


def test_the_reply_of_another_key_is_found() -> None:
    assert found([A], [OWN, replay("3", 3.0, "Z")]) != []


def test_the_reply_of_another_call_told_as_ones_own_is_found() -> None:
    assert found([A], [OWN, Asked(KEY, "3", 3.0, 3.1, "ran", "A", b"A")]) == [
        f"{KEY}: call 3 was given the reply of 1 as its own"
    ]


def test_a_reply_before_its_run_has_ended_is_found() -> None:
    assert found([A], [OWN._replace(until=1.5)]) == [f"{KEY}: call 1 was answered by A before that had ended"]


def test_a_failure_of_which_no_run_knows_is_found() -> None:
    told = Asked(KEY, "3", 1.5, 1.6, "failed")
    assert found([A], [OWN, told]) == [f"{KEY}: call 3 was told that it failed, and did not"]


def test_a_failure_after_completion_is_found() -> None:
    again = Run(KEY, "C", 2, "two", "9", began=5.0, ended=6.0, failed=True)
    told = found([A, again], [OWN, replay("3", 3.0), Asked(KEY, "9", 4.9, 6.1, "failed")], STALLED)
    assert f"{KEY}: call 9 was failed after the key was done" in told


def test_an_answer_that_nobody_should_get_is_found() -> None:
    assert found([A], [OWN, Asked(KEY, "3", 3.0, 3.1, "other")]) == [f"{KEY}: call 3 was told what nobody should be"]
