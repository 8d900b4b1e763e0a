"""Ground floor: the machine of an idempotency record, as one literal table. Nothing here decides; it says what holds.

``decisions.idempotency`` reads its answers here, the stores are held to it, and the documentation draws it. Each
combination of command, state and circumstances meets exactly one row.
"""

from collections.abc import Iterator
from itertools import product
from typing import Literal, NamedTuple

State = Literal["absent", "in_progress", "abandoned", "completed", "expired", "released"]
"""``abandoned`` is in progress with the lease out; ``expired`` is a tombstone: the operation ran, its reply is gone.

``released`` is as good as absent but for the epoch: who took over has given the key back, and who had been given up may
still be at work, under a lower epoch than the next owner must have.
"""

Command = Literal["claim", "renew", "complete", "release", "resolve", "forget"]

Answer = Literal["claimed", "in_progress", "completed", "mismatched", "abandoned", "expired", "yes", "no"]


class Row(NamedTuple):
    """What a command does to a record.

    Args:
        name: unique.
        command: what is asked. ``resolve`` and ``forget`` are an operator's.
        states: those of the record in which the row holds.
        answer: what the store says.
        then: the state afterwards; None where nothing is written.
        why: one line for the documentation.
        by: ``owner``: the command carries the token that the record has.
        payload: of a claim; ``other`` where its fingerprint differs from the record's.
        takeover: of a claim.
        turn: of a release; ``first`` where the record's epoch is 1, ``later`` where it is higher.
        epoch: of what is written: 1, the record's, or one more.
    """

    name: str
    command: Command
    states: tuple[State, ...]
    answer: Answer
    then: State | None
    why: str
    by: Literal["owner", "other", "any"] = "any"
    payload: Literal["same", "other", "any"] = "any"
    takeover: Literal["reexecute", "refuse", "any"] = "any"
    turn: Literal["first", "later", "any"] = "any"
    epoch: Literal["first", "kept", "raised"] = "kept"


_UNFINISHED: tuple[State, ...] = ("in_progress", "abandoned")
_DONE: tuple[State, ...] = ("completed", "expired")

ROWS = (
    Row(
        "first claim", "claim", ("absent",), "claimed", "in_progress",
        "nobody has asked for it, or what they left is forgotten", epoch="first",
    ),
    Row(
        "claim after a release", "claim", ("released",), "claimed", "in_progress",
        "free for any payload; whoever was given up before is of a lower epoch", epoch="raised",
    ),
    Row(
        "mismatch", "claim", (*_UNFINISHED, *_DONE), "mismatched", None,
        "a key means one request, during its run and after it", payload="other",
    ),
    Row(
        "repeated claim", "claim", _UNFINISHED, "claimed", "in_progress",
        "a command that a driver sends twice does not meet itself", by="owner", payload="same",
    ),
    Row(
        "twin", "claim", ("in_progress",), "in_progress", None,
        "the owner is alive, and its reply will come", by="other", payload="same",
    ),
    Row(
        "takeover", "claim", ("abandoned",), "claimed", "in_progress",
        "the owner is gone; the epoch tells the next one that it is not the first",
        by="other", payload="same", takeover="reexecute", epoch="raised",
    ),
    Row(
        "refused takeover", "claim", ("abandoned",), "abandoned", None,
        "the owner is gone, and nobody knows what it did", by="other", payload="same", takeover="refuse",
    ),
    Row(
        "replay", "claim", ("completed",), "completed", None,
        "what ran is answered, never run again", payload="same",
    ),
    Row(
        "late claim", "claim", ("expired",), "expired", None,
        "it ran; its reply is no longer kept, and a second run is no answer", payload="same",
    ),
    Row(
        "renewal", "renew", _UNFINISHED, "yes", "in_progress",
        "a slow owner is not a dead one, as long as nobody took over", by="owner",
    ),
    Row(
        "stale renewal", "renew", _UNFINISHED, "no", None,
        "the lease went to somebody else", by="other",
    ),
    Row(
        "idle renewal", "renew", ("absent", "released", *_DONE), "no", None,
        "there is no run to keep alive",
    ),
    Row(
        "completion", "complete", _UNFINISHED, "yes", "completed",
        "the reply is kept, though the lease be out, if nobody took over", by="owner",
    ),
    Row(
        "repeated completion", "complete", _DONE, "yes", "completed",
        "a command that a driver sends twice does not meet itself", by="owner",
    ),
    Row(
        "restored completion", "complete", ("absent",), "yes", "completed",
        "the record was lost; a late one is better than a second run", epoch="first",
    ),
    Row(
        "completion after a release", "complete", ("released",), "yes", "completed",
        "who took over gave it back; the reply of one who was given up is better than one more run",
    ),
    Row(
        "stale completion", "complete", (*_UNFINISHED, *_DONE), "no", None,
        "who lost the lease can't overwrite the winner", by="other",
    ),
    Row(
        "release", "release", _UNFINISHED, "yes", "absent",
        "it failed, so a retry may run", by="owner", turn="first",
    ),
    Row(
        "release after a takeover", "release", _UNFINISHED, "yes", "released",
        "it failed, so a retry may run; whoever was given up before may still be at work: no epoch comes again",
        by="owner", turn="later",
    ),
    Row(
        "stale release", "release", _UNFINISHED, "no", None,
        "who lost the lease can't free the winner's key", by="other",
    ),
    Row(
        "idle release", "release", ("absent", "released", *_DONE), "no", None,
        "what is done stays done",
    ),
    Row(
        "resolution", "resolve", ("abandoned",), "yes", "completed",
        "an operator knows what became of it; a higher epoch and another token fence the lost owner", epoch="raised",
    ),
    Row(
        "repeated resolution", "resolve", _DONE, "yes", None,
        "the same resolution is in force already", by="owner",
    ),
    Row(
        "late resolution", "resolve", _DONE, "no", None,
        "a reply that a client may have seen is never changed", by="other",
    ),
    Row(
        "early resolution", "resolve", ("in_progress",), "no", None,
        "the owner is alive and will answer itself",
    ),
    Row(
        "idle resolution", "resolve", ("absent", "released"), "no", None,
        "there is no operation to answer for",
    ),
    Row(
        "forgetting", "forget", ("abandoned", "released", *_DONE), "yes", "absent",
        "an operator lets the key be used as if it were new",
    ),
    Row(
        "early forgetting", "forget", ("in_progress",), "no", None,
        "a second run beside a live owner is what keys are there to prevent",
    ),
    Row(
        "idle forgetting", "forget", ("absent",), "no", None,
        "there is nothing to forget",
    ),
)  # fmt: skip


class Lapse(NamedTuple):
    """What time alone does to a record.

    Args:
        name: unique.
        state: before.
        then: the state afterwards.
        why: one line for the documentation.
    """

    name: str
    state: State
    then: State
    why: str


LAPSES = (
    Lapse("lease out", "in_progress", "abandoned", "the owner has not renewed it for one lease"),
    Lapse("abandoned ttl", "abandoned", "absent", "one ttl has passed since its last renewal"),
    Lapse("released ttl", "released", "absent", "one ttl has passed since its release"),
    Lapse("ttl with a tombstone", "completed", "expired", "the reply's ttl has passed, and the key is remembered"),
    Lapse("ttl", "completed", "absent", "the reply's ttl has passed, and nothing is remembered"),
    Lapse("tombstone out", "expired", "absent", "the key has been remembered for long enough"),
)


def find_row(
    command: Command,
    state: State,
    *,
    owner: bool = False,
    same_payload: bool = True,
    takeover: Literal["reexecute", "refuse"] = "reexecute",
    later: bool = False,
) -> Row:
    """Return the row that holds.

    Args:
        owner: whether the command carries the record's token.
        same_payload: whether a claim's fingerprint is no other than the record's.
        takeover: of a claim.
        later: whether the record's epoch is higher than 1.
    """
    return _CELLS[command, state, owner, same_payload, takeover, later]


def _cells(row: Row) -> Iterator[tuple[object, ...]]:
    owner = {"owner": (True,), "other": (False,), "any": (True, False)}[row.by]
    same = {"same": (True,), "other": (False,), "any": (True, False)}[row.payload]
    takeover = ("reexecute", "refuse") if row.takeover == "any" else (row.takeover,)
    later = {"first": (False,), "later": (True,), "any": (True, False)}[row.turn]
    return product((row.command,), row.states, owner, same, takeover, later)


_CELLS: dict[tuple[object, ...], Row] = {cell: row for row in ROWS for cell in _cells(row)}
