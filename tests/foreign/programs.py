"""Clients that are none of ours, or not of Python: found in .tools/go or on PATH, each run in a process of its own."""

import asyncio
import base64
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
_GO = Path(__file__).parent / "go"
_BIN = ROOT / ".tools" / "go"
_LONGEST = 30.0  # Seconds that a program may run.


def find_program(*names: str) -> str:
    """Return the path of a program by one of its names; skip the test where there is none, or fail it in CI."""
    places = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    path = next(filter(None, (shutil.which(name, path=places) for name in names)), None)
    if path is None:
        _missing(f"no {names[0]} in .tools/go or on PATH")
    return path


def find_go_client() -> str:
    """Return the path of the program in ``go/``; one older than its source counts as none."""
    path = find_program("foreignclient")
    if Path(path).stat().st_mtime < max(file.stat().st_mtime for file in _GO.iterdir()):
        _missing("foreignclient is older than its source")
    return path


def _missing(what: str) -> NoReturn:
    reason = f"{what}; ./dev tools builds it, and needs Go"
    if os.environ.get("REQUIRE_GO"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it wrote."""

    code: int
    out: str
    err: str


async def run_program(path: str, *arguments: str) -> Ended:
    """Run a program to its end, from the root of the checkout."""
    # A proxy of the environment is no way to a server on this machine.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    process = await asyncio.create_subprocess_exec(
        path, *arguments, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), _LONGEST)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def probe(address: str, service: str = "", *, patience: str = "5s") -> int:
    """Return the exit code of ``grpc_health_probe``. Its own second is short beside all the other tests."""
    path = find_program("grpc_health_probe", "grpc-health-probe")
    options = ("-connect-timeout", patience, "-rpc-timeout", patience)
    return (await run_program(path, "-addr", address, "-service", service, *options)).code


@dataclass(frozen=True)
class GoCall:
    """What grpc-go knew once a call was over. Elapsed are seconds, retries included."""

    code: str
    message: str
    replies: list[bytes]
    trailers: dict[str, list[str]]
    elapsed: float


async def call_from_go(
    address: str,
    method: str,
    request: bytes = b"one",
    *,
    kind: str = "unary_unary",
    calls: int = 1,
    headers: Sequence[tuple[str, str]] = (),
    service_config: str = "{}",
) -> list[GoCall]:
    """Call a method from one Go process, ``calls`` times, one after the other over one connection."""
    options = ["-target", address, "-method", method, "-kind", kind, "-calls", str(calls)]
    options += ["-service-config", service_config, "-request", base64.b64encode(request).decode()]
    for name, value in headers:
        options += ["-header", f"{name}: {value}"]
    ended = await run_program(find_go_client(), *options)
    assert ended.code == 0, ended.err
    return [_go_call(json.loads(line)) for line in ended.out.splitlines()]


def _go_call(told: dict[str, Any]) -> GoCall:
    return GoCall(
        told["code"],
        told["message"],
        [base64.b64decode(reply) for reply in told["replies"]],
        told["trailers"] or {},
        told["elapsed"],
    )
