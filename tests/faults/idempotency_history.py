"""Decides whether what clients and handlers saw of idempotency keys can be: a pure function over a recorded history.

What the policy promises is *at most once at a time, and one stored reply*. As a history that is, for each key:

1. **One run for each epoch.** Each run was granted the key under an epoch of its own. (Not each epoch has a run: a
   worker may die between grant and run.) Only where the first owner itself failed, the next run is the first again.
2. **Epochs rise.** A later run has a higher epoch. Only a process that stood still between its grant and its first
   line may start late: nothing on this side of the application can stop it, and its epoch is what tells it.
3. **Nobody takes over from the living.** A second run has a cause: since the run before was asked for, its process was
   killed or stood still, or the store did; and about a lease has passed since. Once a run's reply has been answered,
   later causes count no more: what is answered is stored. Or else the run before had failed, which frees the key.
4. **One stored reply.** All replays of a key are equal, and are the reply of one run that had ended by then: that of
   the highest epoch, since nobody is granted a key that is done, and no earlier owner can overwrite a later one, unless
   that has failed.
5. **What was replayed stays so.** Whoever asks after somebody was replayed is replayed, too, or told that the store is
   gone: never run, never failed, never told to wait. (A retry's own time, from asking to being answered, may overlap
   anything.)
6. **Everyone is answered for themselves.** A reply that is not a replay is that of the very run that the call started,
   and so is a failure.
7. **Nothing else is told.** In these histories each key has one payload, and nothing expires.

A stalled owner's own first answer is thus the only reply that may differ from the stored one. It is no lie: its run had
its effect, and its client is told of that one. But it must be a lower epoch than the stored reply's (4), and needs a
cause (3).

A client whose answer was lost (``unknown``) says nothing, but that its call may have run.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from math import inf
from operator import attrgetter
from typing import Literal, NamedTuple


class Run(NamedTuple):
    """A handler's run, as told by what it had effect on.

    Args:
        key: the caller and the idempotency key.
        run: unique.
        epoch: as the handler was told it.
        process: unique; one that is started again is another.
        op: the call that started it.
        began: seconds, on the one clock of the history.
        ended: when its side effect was done; infinite where it never was.
        failed: whether it failed at its end.
    """

    key: str
    run: str
    epoch: int
    process: str
    op: str
    began: float
    ended: float = inf
    failed: bool = False


class Asked(NamedTuple):
    """A client's call.

    Args:
        op: unique.
        at: when it was sent.
        until: when its answer came; infinite where none did.
        told: ``ran``: its own reply. ``replayed``: the reply of an earlier run. ``waiting``: refused, since a twin
            runs. ``failed``: its own run did. ``refused``: because the store is gone. ``unknown``: no answer.
            ``other``: anything else.
        run: whose reply it is, if any.
        reply: its bytes.
    """

    key: str
    op: str
    at: float
    until: float
    told: Literal["ran", "replayed", "waiting", "failed", "refused", "unknown", "other"]
    run: str = ""
    reply: bytes = b""


class Fault(NamedTuple):
    """When something could not do its work.

    Args:
        process: which; None for the store.
        began: seconds.
        ended: when it could again; infinite where it was killed.
    """

    process: str | None
    began: float
    ended: float


class History(NamedTuple):
    """All that was seen."""

    runs: Sequence[Run]
    asked: Sequence[Asked]
    faults: Sequence[Fault]


def violations(history: History, *, lease: float) -> list[str]:
    """Return what can't be, in words; nothing where each key's history is as promised.

    Args:
        lease: seconds.
    """
    by_key = attrgetter("key")
    runs = {key: list(group) for key, group in groupby(sorted(history.runs, key=by_key), by_key)}
    asked = {key: list(group) for key, group in groupby(sorted(history.asked, key=by_key), by_key)}
    return [
        f"{key}: {found}"
        for key in sorted(runs.keys() | asked.keys())
        for found in _Key(runs.get(key, []), asked.get(key, []), history.faults).found(lease)
    ]


class _Key:
    """One key's history."""

    def __init__(self, runs: list[Run], asked: list[Asked], faults: Sequence[Fault]) -> None:
        self._runs = {run.run: run for run in runs}
        self._asked = {call.op: call for call in asked}
        self._faults = faults

    def found(self, lease: float) -> Iterator[str]:
        yield from self._epochs()
        yield from self._takeovers(lease)
        yield from self._answers()
        yield from self._replays()

    def _epochs(self) -> Iterator[str]:
        in_time = sorted(self._runs.values(), key=attrgetter("began"))
        for index, later in enumerate(in_time):
            for run in in_time[:index]:
                if run.epoch == later.epoch:
                    if run.epoch == 1 and _freed(run, later):
                        continue
                    yield f"runs {run.run} and {later.run} both have epoch {run.epoch}"
                elif run.epoch > later.epoch and not self._stood_still(later):
                    yield f"run {later.run} of epoch {later.epoch} began after one of epoch {run.epoch}"

    def _stood_still(self, run: Run) -> bool:
        return any(
            fault.process == run.process and fault.began <= run.began and fault.ended >= self._since(run)
            for fault in self._faults
        )

    def _since(self, run: Run) -> float:
        return self._asked[run.op].at if run.op in self._asked else run.began

    def _takeovers(self, lease: float) -> Iterator[str]:
        for run, heir in pairwise(sorted(self._runs.values(), key=attrgetter("epoch", "began"))):
            if run.epoch == heir.epoch or _freed(run, heir):
                continue  # told already, or no takeover
            answered = [call.until for call in self._asked.values() if call.told == "ran" and call.run == run.run]
            since, until = self._since(run), min([heir.began, *answered])
            causes = [
                fault.began
                for fault in self._faults
                if fault.process in (None, run.process) and fault.began <= until and fault.ended >= since
            ]
            if not causes:
                yield f"run {heir.run} took over from {run.run}, whose process and store were well"
            # The last renewal may have been a third of a lease before.
            elif heir.began < max(min(causes), since) + lease / 2:
                yield f"run {heir.run} took over from {run.run} before its lease was out"

    def _answers(self) -> Iterator[str]:
        for call in self._asked.values():
            if call.told == "other":
                yield f"call {call.op} was told what nobody should be"
            if call.told == "failed" and not any(run.failed and run.op == call.op for run in self._runs.values()):
                yield f"call {call.op} was told that it failed, and did not"
            if call.told not in ("ran", "replayed"):
                continue
            run = self._runs.get(call.run)
            if run is None:
                yield f"call {call.op} was answered by {call.run}, which is no run of this key"
            elif call.told == "ran" and run.op != call.op:
                yield f"call {call.op} was given the reply of {run.op} as its own"
            elif run.ended > call.until:
                yield f"call {call.op} was answered by {run.run} before that had ended"

    def _replays(self) -> Iterator[str]:
        replays = [call for call in self._asked.values() if call.told == "replayed"]
        if not replays:
            return
        first = min(replays, key=attrgetter("until"))
        for call in replays:
            if (call.run, call.reply) != (first.run, first.reply):
                yield f"calls {first.op} and {call.op} were replayed different replies"
        own = [call for call in self._asked.values() if call.told == "ran" and call.run == first.run]
        if any(call.reply != first.reply for call in own):
            yield f"the replay of {first.run} is not its reply"
        stored = self._runs.get(first.run)
        lasting = (run for run in self._runs.values() if not run.failed)
        highest = max(lasting, key=attrgetter("epoch"), default=None)
        if stored is not None and highest is not None and stored.epoch < highest.epoch:
            yield f"the reply of epoch {stored.epoch} is kept, though epoch {highest.epoch} had been granted"
        for call in self._asked.values():
            if call.at > first.until and call.told in ("ran", "failed", "waiting"):
                yield f"call {call.op} was {call.told} after the key was done"
        for run in self._runs.values():
            if run.op in self._asked and self._asked[run.op].at > first.until:
                yield f"run {run.run} began after the key was done"


def _freed(run: Run, heir: Run) -> bool:
    """Tell whether a run had failed, and so freed the key, when another began."""
    return run.failed and run.ended <= heir.began
