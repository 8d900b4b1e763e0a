"""Random faults for a bounded time, and then every key's history must be one that the policy promises."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.idempotency_history import violations
from tests.faults.idempotency_scene import world
from tests.faults.idempotency_storm import Storm

pytestmark = pytest.mark.slow

LEASE = 1.0
SEED = 6
SECONDS = 18.0  # Of faults; each key's last retries come after.


async def test_every_keys_history_is_as_promised(tmp_path: Path) -> None:
    async with world(tmp_path, lease=LEASE) as scene:
        storm = Storm(scene, SEED)
        history = await storm.rage(SECONDS)
    told = Counter(call.told for call in history.asked)
    struck = Counter("redis" if fault.process is None else "worker" for fault in storm.faults)
    print(f"{told}, {len(history.runs)} runs, {sum(run.epoch > 1 for run in history.runs)} takeovers, {struck}")
    assert violations(history, lease=LEASE) == []
    # It was a storm.
    assert min(told["ran"], told["replayed"], told["waiting"], told["failed"], told["unknown"]) > 10
    assert min(struck["redis"], struck["worker"]) > 3
    assert any(run.epoch > 1 for run in history.runs)


@pytest.mark.parametrize(
    ("lies", "expected"), [("claims", "both have epoch 1"), ("completes", "whose process and store were well")]
)
async def test_the_checker_finds_a_seeded_bug(tmp_path: Path, lies: str, expected: str) -> None:
    """One store grants whatever is asked for, and the other keeps no reply and says that it does."""
    async with world(tmp_path, lease=LEASE, lies=lies) as scene:
        history = await Storm(scene, SEED).rage(LEASE, faults=False)
    assert any(expected in found for found in violations(history, lease=LEASE))
