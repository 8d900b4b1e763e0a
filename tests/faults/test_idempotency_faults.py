"""Processes and Redis are killed and stopped under keyed calls, over both doors; nothing runs twice that must not.

Each test finds the cell of one row of the table that its name begins with, and holds it to the one that is safe. At the
end the table is printed. What may differ between two runs of the tests is not in a cell.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import cycle
from time import monotonic

import pytest
import pytest_asyncio

from tests.faults.idempotency_doors import DOORS, OTHER, PAYLOAD, Answer, Door, tally
from tests.faults.idempotency_scene import GONE, IN_PROGRESS, Worker, World, refuses_connections, retried, until, world
from tests.faults.idempotency_server import COOKIES, HEADERS, MAX_REPLY, TRAILERS

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

LEASE = 1.5
SLACK = 1.0  # Seconds that a busy machine, or a waiting twin's next look, may add to a bound.
DEADLINE = 0.25  # What a store may take for a step.
MISMATCH, ABANDONED = "idempotency_payload_mismatch", "idempotency_abandoned"
NOT_REPLAYABLE = "idempotency_not_replayable"

# row: (fault, the safe cell over HTTP, the safe cell over gRPC where it is another)
SAFE: dict[str, tuple[str, ...]] = {
    "a": (
        "100 at once at two processes, then a late retry",
        "1 run; 1 ran, 99 told 409; replay",
        "1 run; 1 ran, 99 waited for its reply; replay",
    ),
    "a'": ("instant handlers: 120 keys, 5 twins each", "0 ran twice, 0 errors"),
    "b before": ("kill -9 between claim and handler", "blocked for a lease at most; then epoch 2, or abandoned"),
    "b in": ("kill -9 after the side effect", "blocked for a lease at most; then epoch 2, or abandoned"),
    "b after": ("kill -9 with the reply stored, unsent", "replay, or replay"),
    "b 422": ("another payload meanwhile", "refused"),
    "c": ("another payload after / during", "refused / refused"),
    "c'": ("the same payload in another order", "replay"),
    "d": ("Redis killed after the claim; the retry when it is back, empty", "first gets its reply; restored, replay"),
    "d restart": ("Redis killed and back, empty, before the handler ends", "first gets its reply; restored, replay"),
    "d gap": ("a twin in that gap", "runs, as no layer could know; both get their reply; one is kept"),
    "d'": ("Redis down before", "refused at once, no run; runs when it is back"),
    "d''": ("Redis frozen before the claim", "refused within the deadline; 1 run when it thaws"),
    "d'' late": ("Redis frozen between claim and end", "first gets its reply within the deadline; replay"),
    "e": ("handler of 2.5 leases", "1 run"),
    "e'": ("owner stopped past its lease, wakes, succeeds", "own client gets its own; one reply kept"),
    "e''": ("owner stopped past its lease, wakes, fails", "the winner's claim stays; its reply is kept"),
    "e'''": ("owner stopped past its lease, its successor fails", "epochs 1, 2, 3; the third's reply is kept"),
    "f": ("B sends A's key, same payload", "own run each"),
    "g": ("client hangs up: retry during / after", "409 / replay", "ABORTED / replay"),
    "g'": ("SIGTERM in the handler: its client / retry at the other", "its reply, exit 0 / replay"),
    "h": ("exception / 503 / final 404, sent twice: runs", "2 / 2 / 1 and replay"),
    "i": (
        "the replay's body; its headers",
        "exact; all but the 2 cookies, in order; protected",
        "exact; all trailers, in order",
    ),
    "j": (
        "stream; one over the bound",
        "intact, replay; intact, then not replayable; 1 run each",
        "a key on a stream is refused, no run",
    ),
    "k": ("retry during a background task", "replay"),
    "l": ("after the ttl / with a tombstone", "runs again / not replayable, 1 run"),
}


class Table:
    """The cells that were found."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str], str] = {}

    def tell(self, row: str, door: Door, cell: str) -> None:
        """Note a cell; it must be the safe one."""
        self._cells[row, door.name] = cell
        safe = SAFE[row][1:]
        assert cell == safe[-1 if door.name == "grpc" else 0], row

    def lines(self) -> Iterator[str]:
        """Render the table."""
        yield "| fault | HTTP | gRPC |"
        yield "|---|---|---|"
        for row, (title, *_) in SAFE.items():
            http, grpc = (self._cells.get((row, name), "not run") for name in ("http", "grpc"))
            yield f"| {row}: {title} | {http} | {grpc if grpc != http else 'the same'} |"


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Collect the cells; print them all at the end."""
    found = Table()
    yield found
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert terminal is not None
    assert capture is not None
    with capture.global_and_fixture_disabled():
        terminal.write_line("")
        for line in found.lines():
            terminal.write_line(line)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("workers"), lease=LEASE) as started:
        yield started


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param]


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    name: str = request.node.name
    return name


def name_of(key: str, caller: str = "alice") -> str:
    """Name a key as the ledger does."""
    return f"{caller}/{key}"


def place(door: Door, worker: Worker, key: str, **how: object) -> asyncio.Task[Answer]:
    """Begin a call."""
    return asyncio.create_task(door.post(worker, key, **how))  # type: ignore[arg-type] # as the test says


async def within(seconds: float, call: asyncio.Task[Answer]) -> Answer:
    """Return the answer, which must not take longer."""
    return await asyncio.wait_for(call, seconds)


async def test_a_one_of_a_hundred_twins_runs(scene: World, door: Door, key: str, table: Table) -> None:
    one, two = scene.workers
    workers = cycle((one, two))
    calls = [place(door, next(workers), key, hold=["run"], announced=True) for _ in range(100)]
    await scene.ledger.seen(name_of(key), "arrived", 100)
    if not door.waits:
        async with asyncio.timeout(20):
            while sum(call.done() for call in calls) < 99:
                await asyncio.wait([call for call in calls if not call.done()], return_when=asyncio.FIRST_COMPLETED)
    scene.ledger.release(await scene.ledger.seen(name_of(key)))
    answers = await asyncio.gather(*calls)
    late = [await door.post(worker, key) for worker in (one, two)]
    runs = len(scene.ledger.runs(name_of(key)))
    counts = tally(answers)
    others = f"{counts.get('replayed')} waited for its reply" if door.waits else f"{counts.get(IN_PROGRESS)} told 409"
    assert sum(counts.values()) == 100
    assert len({answer.body for answer in (*answers, *late) if answer.run}) == 1
    replay = "replay" if {answer.told for answer in late} == {"replayed"} else str(late)
    table.tell("a", door, f"{runs} run; {counts.get('ran')} ran, {others}; {replay}")


async def test_a_twins_of_instant_handlers_never_both_run(scene: World, door: Door, key: str, table: Table) -> None:
    workers = cycle(scene.workers)
    keys = [f"{key}-{n}" for n in range(120)]
    answers = await asyncio.gather(*(door.post(next(workers), twin) for twin in keys for _ in range(5)))
    twice = sum(len(scene.ledger.runs(name_of(each))) != 1 for each in keys)
    errors = 600 - sum(tally(answers).get(told, 0) for told in ("ran", "replayed", IN_PROGRESS))
    table.tell("a'", door, f"{twice} ran twice, {errors} errors")


async def test_b_a_killed_worker_blocks_a_key_for_one_lease(scene: World, door: Door, key: str, table: Table) -> None:
    """Before the handler's side effect, after it, and with the reply stored; under either policy for a takeover."""
    victim, other = scene.workers
    sites = [(site, to) for site in ("before", "run", "after") for to in ("reexecute", "refuse")]
    calls = [place(door, victim, f"{key}-{site}-{to}", to=to, hold=[site]) for site, to in sites]
    for site, to in sites:
        await scene.ledger.seen(name_of(f"{key}-{site}-{to}"), site)
    await victim.kill()
    killed = monotonic()
    fresh = asyncio.create_task(scene.replace(victim))
    wrong = await asyncio.gather(*(door.post(other, f"{key}-{site}-{to}", to=to, payload=OTHER) for site, to in sites))
    table.tell("b 422", door, "refused" if tally(wrong) == {MISMATCH: 6} else str(wrong))

    async def outcome(site: str, to: str) -> tuple[str, float]:
        name = f"{key}-{site}-{to}"
        answer, _ = await retried(lambda: door.post(other, name, to=to), IN_PROGRESS)
        freed_at = monotonic()
        again = await door.post(other, name, to=to)
        runs = scene.ledger.runs(name_of(name))
        lost = 1 if site == "run" else 0
        match answer.told, again.told:
            case "ran", "replayed" if [run.epoch for run in runs[lost:]] == [2] and again.body == answer.body:
                return "epoch 2", freed_at
            case "idempotency_abandoned", "idempotency_abandoned" if len(runs) == lost:
                return "abandoned", freed_at
            case "replayed", "replayed" if len(runs) == 1 and answer.run == runs[0].run:
                return "replay", freed_at
        return f"{answer} {again} {runs}", freed_at

    found = dict(zip(sites, await asyncio.gather(*(outcome(*site) for site in sites)), strict=True))
    assert tally(await asyncio.gather(*calls)) == {"lost": 6}
    await fresh
    for row, site in (("b before", "before"), ("b in", "run"), ("b after", "after")):
        (first, freed), (second, refused) = found[site, "reexecute"], found[site, "refuse"]
        blocked = max(freed, refused) - killed
        bound = "" if site == "after" else "blocked for a lease at most; then "
        assert blocked < LEASE + SLACK, f"blocked for {blocked:.2f} s"
        table.tell(row, door, f"{bound}{first}, or {second}")


async def test_c_another_payload_is_refused_after_and_during(scene: World, door: Door, key: str, table: Table) -> None:
    one, two = scene.workers
    first = place(door, one, key, hold=["run"])
    note = await scene.ledger.seen(name_of(key))
    during = await asyncio.gather(*(door.post(worker, key, payload=OTHER) for worker in (one, two)))
    scene.ledger.release(note)
    assert (await first).told == "ran"
    after = await asyncio.gather(*(door.post(worker, key, payload=OTHER) for worker in (one, two)))
    cells = ["refused" if tally(told) == {MISMATCH: 2} else str(told) for told in (after, during)]
    assert len(scene.ledger.runs(name_of(key))) == 1
    table.tell("c", door, " / ".join(cells))
    again = await door.post(two, key, payload=dict(reversed([*PAYLOAD.items()])))
    table.tell("c'", door, "replay" if again.told == "replayed" and again.body == (await first).body else str(again))


async def test_d_a_reply_outlives_the_redis_that_claimed_it(scene: World, door: Door, key: str, table: Table) -> None:
    """Killed and back only after the handler's end, or before it; with a twin in between, which can't be told."""
    one, two = scene.workers
    names = [f"{key}-{site}" for site in ("late", "restart", "gap")]
    calls = [place(door, one, name, hold=["run"]) for name in names]
    notes = [await scene.ledger.seen(name_of(name)) for name in names]
    scene.redis.kill()
    scene.ledger.release(notes[0])
    firsts = [await within(DEADLINE + SLACK, calls[0])]
    scene.redis.start()
    await scene.redis.ready()
    twin, _ = await retried(lambda: door.post(two, names[2]), GONE)
    await until(lambda: _holds(scene, 2))  # the twin's, and what was kept in memory
    scene.ledger.release(notes[1])
    scene.ledger.release(notes[2])
    firsts += [await within(DEADLINE + SLACK, call) for call in calls[1:]]
    retries = [[await door.post(worker, name) for worker in (one, two)] for name in names]
    for row, first, again, name in zip(("d", "d restart"), firsts, retries, names, strict=False):
        assert len(scene.ledger.runs(name_of(name))) == 1, row
        got = "first gets its reply" if first.told == "ran" else str(first)
        same = tally(again) == {"replayed": 2} and {answer.body for answer in again} == {first.body}
        table.tell(row, door, f"{got}; {'restored, replay' if same else again}")
    both = firsts[2].told == twin.told == "ran" and firsts[2].run != twin.run
    kept = tally(retries[2]) == {"replayed": 2} and {answer.body for answer in retries[2]} == {twin.body}
    assert len(scene.ledger.runs(name_of(names[2]))) == 2
    words = ("both get their reply" if both else f"{firsts[2]} {twin}", "one is kept" if kept else str(retries[2]))
    table.tell("d gap", door, f"runs, as no layer could know; {'; '.join(words)}")


async def _holds(scene: World, count: int) -> bool:
    return await scene.records() >= count


async def test_d_without_redis_a_call_is_refused_and_does_not_run(
    scene: World, door: Door, key: str, table: Table
) -> None:
    one, two = scene.workers
    scene.redis.kill()
    refused = [await within(DEADLINE + SLACK, place(door, worker, key)) for worker in (one, two, one)]
    runs = len(scene.ledger.runs(name_of(key)))
    scene.redis.start()
    await scene.redis.ready()
    after, _ = await retried(lambda: door.post(one, key), GONE)
    again, _ = await retried(lambda: door.post(two, key), GONE)
    words = "refused at once" if tally(refused) == {GONE: 3} else str(refused)
    back = "runs when it is back" if (after.told, again.told) == ("ran", "replayed") else f"{after} {again}"
    table.tell("d'", door, f"{words}, {'no run' if runs == 0 else runs}; {back}")


async def test_d_a_frozen_redis_costs_one_deadline(scene: World, door: Door, key: str, table: Table) -> None:
    """Frozen before the claim, and between claim and end. A claim that was given up arrives when it thaws."""
    one, two = scene.workers
    late = f"{key}-late"
    call = place(door, one, late, to="patient", hold=["run"])
    note = await scene.ledger.seen(name_of(late))
    scene.redis.signal(signal.SIGSTOP)
    try:
        scene.ledger.release(note)
        refused, first = await asyncio.gather(
            within(DEADLINE + SLACK, place(door, two, key)), within(DEADLINE + SLACK, call)
        )
    finally:
        scene.redis.signal(signal.SIGCONT)
    after, _ = await retried(lambda: door.post(two, key), GONE, IN_PROGRESS)
    again, _ = await retried(lambda: door.post(one, key), GONE)
    kept, _ = await retried(lambda: door.post(two, late, to="patient"), GONE, IN_PROGRESS)
    runs = len(scene.ledger.runs(name_of(key)))
    thawed = (after.told, again.told) == ("ran", "replayed") and after.body == again.body
    words = "refused within the deadline" if refused.told == GONE else str(refused)
    table.tell("d''", door, f"{words}; {f'{runs} run when it thaws' if thawed else f'{after} {again}'}")
    assert len(scene.ledger.runs(name_of(late))) == 1
    words = "first gets its reply within the deadline" if first.told == "ran" else str(first)
    same = kept.told == "replayed" and kept.body == first.body
    table.tell("d'' late", door, f"{words}; {'replay' if same else kept}")


async def test_e_a_lease_lasts_as_long_as_its_handler(scene: World, door: Door, key: str, table: Table) -> None:
    one, two = scene.workers
    call = place(door, one, key, hold=["run"])
    note = await scene.ledger.seen(name_of(key))
    workers = cycle((two, one))
    while monotonic() < note.at + 2.5 * LEASE:
        assert (await door.post(next(workers), key, patience=1.0)).told == IN_PROGRESS
    scene.ledger.release(note)
    first, again = await call, await door.post(two, key)
    assert (first.told, again.told) == ("ran", "replayed")
    assert first.body == again.body
    table.tell("e", door, f"{len(scene.ledger.runs(name_of(key)))} run")


async def test_e_a_stalled_owner_neither_overwrites_nor_frees_its_successor(
    scene: World, door: Door, key: str, table: Table
) -> None:
    """One succeeds when it wakes and one fails; of either kind, a successor has ended by then, or runs still."""
    stalled, other = scene.workers
    kinds = [(end, state) for end in ("ok", "raise") for state in ("ended", "runs")]
    names = {kind: "-".join((key, *kind)) for kind in kinds}
    olds = {kind: place(door, stalled, names[kind], hold=["run"], end=kind[0]) for kind in kinds}
    notes = {kind: await scene.ledger.seen(name_of(names[kind])) for kind in kinds}
    stalled.signal(signal.SIGSTOP)

    async def take_over(kind: tuple[str, str]) -> Answer:
        hold = ["run"] if kind[1] == "runs" else []
        answer, _ = await retried(lambda: door.post(other, names[kind], hold=hold), IN_PROGRESS)
        return answer

    news = {kind: asyncio.create_task(take_over(kind)) for kind in kinds}
    winners = {kind: await scene.ledger.seen(name_of(names[kind]), count=2) for kind in kinds}
    assert {note.epoch for note in winners.values()} == {2}
    await asyncio.gather(*(news[kind] for kind in kinds if kind[1] == "ended"))
    for note in notes.values():
        scene.ledger.release(note)
    stalled.signal(signal.SIGCONT)
    owns = {kind: await old for kind, old in olds.items()}
    for kind in kinds:
        if kind[1] == "runs":
            twins = (door.post(worker, names[kind], patience=1.0) for worker in (stalled, other))
            assert tally(await asyncio.gather(*twins)) == {IN_PROGRESS: 2}, kind
            scene.ledger.release(winners[kind])
    for kind in kinds:
        won = await news[kind]
        kept = [await door.post(worker, names[kind]) for worker in (stalled, other)]
        assert (won.told, won.run) == ("ran", winners[kind].run), kind
        assert tally(kept) == {"replayed": 2}, kind
        assert {answer.body for answer in kept} == {won.body}, kind
        assert len(scene.ledger.runs(name_of(names[kind]))) == 2, kind
        own = owns[kind]
        if kind[0] == "ok":
            assert (own.told, own.run) == ("ran", notes[kind].run), kind
        else:
            assert own.told == "failed", kind
    table.tell("e'", door, "own client gets its own; one reply kept")
    table.tell("e''", door, "the winner's claim stays; its reply is kept")


async def test_e_epochs_rise_though_a_successor_fails(scene: World, door: Door, key: str, table: Table) -> None:
    """Who was stopped is still there: none that runs since may have its epoch, or one of another."""
    stalled, other = scene.workers
    old = place(door, stalled, key, hold=["run"])
    note = await scene.ledger.seen(name_of(key))
    stalled.signal(signal.SIGSTOP)
    second, _ = await retried(lambda: door.post(other, key, end="raise"), IN_PROGRESS)
    third = await door.post(other, key)
    scene.ledger.release(note)
    stalled.signal(signal.SIGCONT)
    first = await old
    kept = [await door.post(worker, key) for worker in (stalled, other)]
    assert [first.told, second.told, third.told] == ["ran", "failed", "ran"]
    same = tally(kept) == {"replayed": 2} and {answer.body for answer in kept} == {third.body}
    epochs = ", ".join(str(run.epoch) for run in scene.ledger.runs(name_of(key)))
    table.tell("e'''", door, f"epochs {epochs}; {'the third' if same else kept}'s reply is kept")


async def test_f_a_key_is_its_callers_own(scene: World, door: Door, key: str, table: Table) -> None:
    one, two = scene.workers
    first, second = await door.post(one, key), await door.post(two, key, caller="bob")
    apart = first.told == second.told == "ran" and first.run != second.run
    runs = [len(scene.ledger.runs(name_of(key, caller))) for caller in ("alice", "bob")]
    table.tell("f", door, "own run each" if apart and runs == [1, 1] else f"{first} {second} {runs}")


async def test_g_work_outlives_the_client_that_hangs_up(scene: World, door: Door, key: str, table: Table) -> None:
    one, two = scene.workers
    call = place(door, one, key, hold=["run"])
    note = await scene.ledger.seen(name_of(key))
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    during = await asyncio.gather(*(door.post(worker, key, patience=1.0) for worker in (one, two)))
    scene.ledger.release(note)
    after, _ = await retried(lambda: door.post(two, key), IN_PROGRESS)
    assert len(scene.ledger.runs(name_of(key))) == 1
    word = during[0].status if tally(during) == {IN_PROGRESS: 2} else str(during)
    table.tell("g", door, f"{word} / {'replay' if (after.told, after.run) == ('replayed', note.run) else after}")


async def test_g_sigterm_lets_a_keyed_handler_finish(scene: World, door: Door, key: str, table: Table) -> None:
    """One client waits for its reply, and another has left."""
    leaving, other = scene.workers
    left = f"{key}-left"
    call, gone = (place(door, leaving, name, hold=["run"]) for name in (key, left))
    notes = [await scene.ledger.seen(name_of(name)) for name in (key, left)]
    gone.cancel()
    with suppress(asyncio.CancelledError):
        await gone
    leaving.signal(signal.SIGTERM)
    for port in leaving.ports:
        await until(lambda port=port: refuses_connections(port))  # type: ignore[misc] # the loop's own port
    during = await door.post(other, key, patience=1.0)
    for note in notes:
        scene.ledger.release(note)
    first = await call
    code = await asyncio.wait_for(leaving.process.wait(), 15)
    fresh = asyncio.create_task(scene.replace(leaving))
    kept = [await door.post(other, name) for name in (key, left)]
    await fresh
    assert during.told == IN_PROGRESS
    assert [answer.run for answer in kept] == [note.run for note in notes]
    assert [len(scene.ledger.runs(name_of(name))) for name in (key, left)] == [1, 1]
    word = "its reply" if (first.told, first.run) == ("ran", notes[0].run) else str(first)
    table.tell("g'", door, f"{word}, exit {code} / {'replay' if tally(kept) == {'replayed': 2} else kept}")


async def test_h_a_failure_frees_its_key_and_a_final_refusal_is_kept(
    scene: World, door: Door, key: str, table: Table
) -> None:
    one, two = scene.workers
    cells = []
    for end in ("raise", "unavailable", "missing"):
        name = f"{key}-{end}"
        answers = [await door.post(worker, name, end=end) for worker in (one, two)]
        runs = len(scene.ledger.runs(name_of(name)))
        told = [answer.told for answer in answers]
        if end == "missing":
            assert answers[0].body == answers[1].body
            cells.append(f"{runs} and replay" if told == ["ran", "replayed"] else str(answers))
        else:
            cells.append(str(runs) if told == ["failed", "failed"] else str(answers))
    table.tell("h", door, " / ".join(cells))


async def test_i_a_replay_is_the_reply_byte_for_byte(scene: World, door: Door, key: str, table: Table) -> None:
    one, two = scene.workers
    first = await door.post(one, key, end="headers")
    again = await door.post(two, key, end="headers")
    assert (first.told, again.told) == ("ran", "replayed")
    exact = "exact" if (first.status, first.body) == (again.status, again.body) else f"{first} {again}"
    own = HEADERS if door.name == "http" else TRAILERS
    sent, kept = ([pair for pair in answer.metadata if pair[0] in dict((*own, *COOKIES))] for answer in (first, again))
    if door.name == "http":
        assert sorted(sent) == sorted((*HEADERS, *COOKIES))
        protected = "protected" if len(scene.ledger.runs(name_of(key))) == 1 else "ran twice"
        others = "all but the 2 cookies, in order" if kept == list(HEADERS) else str(kept)
        table.tell("i", door, f"{exact}; {others}; {protected}")
    else:
        table.tell("i", door, f"{exact}; {'all trailers, in order' if sent == kept == list(TRAILERS) else kept}")


async def test_j_a_stream_is_kept_or_refused_and_never_runs_again(
    scene: World, door: Door, key: str, table: Table
) -> None:
    one, two = scene.workers
    if door.name == "grpc":
        answer = await door.post(one, key, to="stream")
        refused = answer.told == "idempotency_key_malformed" and not scene.ledger.runs(name_of(key))
        table.tell("j", door, "a key on a stream is refused, no run" if refused else str(answer))
        return
    short = [await door.post(worker, f"{key}-stream", end="stream") for worker in (one, two)]
    long = [await door.post(worker, f"{key}-long", end="long") for worker in (one, two)]
    runs = {len(scene.ledger.runs(name_of(f"{key}-{end}"))) for end in ("stream", "long")}
    assert (short[0].told, long[0].told) == ("ran", "ran")
    assert short[0].body.startswith(b"   {")
    assert long[0].body.startswith(b" " * 3 * MAX_REPLY + b"{")
    replay = "replay" if short[1].told == "replayed" and short[1].body == short[0].body else str(short[1])
    then = "then not replayable" if long[1].told == NOT_REPLAYABLE else str(long[1])
    table.tell("j", door, f"intact, {replay}; intact, {then}; {'1 run each' if runs == {1} else runs}")


async def test_k_a_background_task_holds_no_key(scene: World, door: Door, key: str, table: Table) -> None:
    one, two = scene.workers
    call = place(door, one, key, end="background", hold=["background"])
    note = await scene.ledger.seen(name_of(key), "background")
    again = [await door.post(worker, key, patience=2.0) for worker in (one, two)]
    scene.ledger.release(note)
    assert (await call).told == "ran"
    table.tell("k", door, "replay" if tally(again) == {"replayed": 2} else str(again))


async def test_l_after_its_ttl_a_key_is_new_or_known_to_be_old(
    scene: World, door: Door, key: str, table: Table
) -> None:
    one, two = scene.workers
    firsts = [await door.post(one, key, to=to) for to in ("short", "tombstone")]
    assert [answer.told for answer in firsts] == ["ran", "ran"]
    (again, lived), (late, remembered) = await asyncio.gather(
        *(retried(lambda to=to: door.post(two, key, to=to), "replayed") for to in ("short", "tombstone"))  # type: ignore[misc] # as above
    )
    assert min(lived, remembered) > LEASE / 2
    runs = len(scene.ledger.runs(name_of(key)))
    word = "runs again" if again.told == "ran" and again.run != firsts[0].run else str(again)
    then = "not replayable, 1 run" if late.told == NOT_REPLAYABLE and runs == 3 else f"{late}, {runs} runs"
    table.tell("l", door, f"{word} / {then}")
