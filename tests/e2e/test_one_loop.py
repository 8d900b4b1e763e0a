"""A service that serves HTTP and gRPC from one event loop, as the demo does, loses nothing at either door."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.grpc_http_one_loop import REQUESTS, RPCS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=pytest.mark.slow)])
def test_both_doors_in_one_loop_answer_every_call_and_share_its_quota(loop: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "default", "-m", "tests.e2e.grpc_http_one_loop", loop],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "loop": loop,
        "ends": {"gRPC OK True": RPCS, "HTTP 200 True": REQUESTS},
        "over": ["RESOURCE_EXHAUSTED", 429],
        "drained": True,
    }
