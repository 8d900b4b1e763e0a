"""However a handler is written and whatever happens to it, its client in another process gets one right status."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.grpc_matrix import ACCIDENTS, CELLS, LEAVES, Cell, Ran, Seen, run_matrix, run_storm
from tests.e2e.grpc_matrix_styles import STYLES
from tests.integration.grpc_world import SECRET

LOOPS = ("asyncio", "uvloop")
REPLAYED = [cell for cell in CELLS if cell.keyed and cell.end not in ACCIDENTS]
ENDED = {"ok": "completed", "slow": "completed", "raise": "failed", "client_cancel": "cancelled"}


@pytest.fixture(scope="module", params=LOOPS)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_matrix(request.param, tmp_path_factory.mktemp(request.param))


def seen(ran: Ran, cell: Cell) -> Seen:
    found = ran.seen[cell]
    if isinstance(found, BaseException):
        raise found
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_each_end_reaches_its_client_as_one_status_with_its_own_ids(ran: Ran, cell: Cell) -> None:
    end = seen(ran, cell).end
    code, text, replies = cell.expected()
    assert (end.code, end.replies) == (code, replies)
    assert text in (None, end.details)
    assert SECRET not in repr(end)
    if cell.end not in LEAVES:
        assert end.get("x-correlation-id") == str(cell)
        assert re.fullmatch("req_[0-9a-f]{32}", end.get("x-request-id") or "")
        assert end.get("x-ratelimit-limit") == "1000000"


@pytest.mark.parametrize("cell", REPLAYED, ids=str)
def test_a_retry_is_answered_by_the_first_run_however_that_ended_for_its_client(ran: Ran, cell: Cell) -> None:
    """Also for whoever left: a keyed handler survives its client."""
    found = seen(ran, cell)
    assert found.again is not None
    end = Cell(cell.style, "ok") if cell.end in LEAVES else cell
    assert (found.again.code, found.again.details or "", found.again.replies) == end.expected()
    assert found.again.get("x-idempotent-replayed") == "true"
    assert found.runs == 1


def test_every_call_is_settled_exactly_once(ran: Ran) -> None:
    assert ran.report["open"] == 0
    for cell in CELLS:
        calls = 1 + (cell in REPLAYED) + (cell.end == "ok" and not cell.early and not cell.keyed)  # the last look
        ended = ran.report["ended"][str(cell)]
        assert len(ended) == calls, cell
        if not cell.keyed and cell.end in ENDED:
            assert set(ended) == {ENDED[cell.end]}, cell


def test_the_server_logs_each_accident_once_with_its_id_and_nothing_else(ran: Ran) -> None:
    assert [line for line in ran.stderr if not line.startswith("[")] == []
    accidents = Counter((f"{cell.path} failed", str(cell)) for cell in CELLS if cell.end in ACCIDENTS)
    assert Counter((message, name) for _, _, message, name, _ in ran.log()) == accidents
    assert {(level, logger) for level, logger, *_ in ran.log()} == {("ERROR", "resilience")}
    assert SECRET not in json.dumps(ran.log())


def test_the_server_serves_on_and_ends_well(ran: Ran) -> None:
    assert ran.serves_on
    assert (ran.exit_code, ran.report["drained"], ran.report["left"]) == (0, True, [])


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_clients_that_leave_at_every_point_leave_nothing_behind(loop: str, tmp_path: Path) -> None:
    ran = run_storm(loop, tmp_path)
    assert ran.serves_on
    assert (ran.exit_code, ran.report["open"], ran.report["left"]) == (0, 0, [])
    assert [line for line in ran.stderr if not line.startswith("[")] == []
    raised = {("ERROR", "resilience", f"{Cell(style, 'raise').path} failed", "ValueError") for style in STYLES}
    assert {(level, logger, message, error) for level, logger, message, _, error in ran.log()} <= raised
