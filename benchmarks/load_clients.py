"""The clients of the load test, each a process of a tool that others made: wrk, vegeta, ghz."""

import asyncio
import base64
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

CONNECTIONS = 64
BODY = {"amount": 100, "currency": "EUR"}
_ROOT = Path(__file__).parents[1]
_SERVICE = "examples.payments.v1.PaymentService"
_INSTALL = {
    "wrk": "apt-get install wrk",
    "vegeta": "GOBIN=$PWD/.tools/go go -C benchmarks/go install tool",
    "ghz": "GOBIN=$PWD/.tools/go go -C benchmarks/go install tool",
}
_numbers = count()  # of the whole run: no two rounds share a key


class Target(NamedTuple):
    """A server that is asked, and a payment that it has."""

    http: int
    grpc: int
    payment: str


class Round(NamedTuple):
    """What a client saw.

    Args:
        sent: requests that were answered, rightly or not.
        failed: those that were not answered, or not with success.
        rate: answers a second.
        latencies: seconds, in order; none if the client does not tell each.
    """

    sent: int
    failed: int
    rate: float
    latencies: Sequence[float] = ()

    def quantile(self, share: float) -> float:
        """Return the latency, in seconds, that so large a share of the requests did not exceed."""
        return self.latencies[min(int(len(self.latencies) * share), len(self.latencies) - 1)]


class ToolError(Exception):
    """A tool is missing, or did not do its work."""


def find_tool(name: str) -> str:
    """Return the path of a tool in ``.tools/go`` or on PATH.

    Raises:
        ToolError: it is in neither; the text says how to get it.
    """
    path = shutil.which(name, path=f"{_ROOT / '.tools' / 'go'}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        raise ToolError(f"no {name}: {_INSTALL[name]}")
    return path


async def _run(name: str, *arguments: str) -> str:
    # A proxy of the environment is no way to a server on this machine.
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    process = await asyncio.create_subprocess_exec(
        find_tool(name),
        *arguments,
        cwd=_ROOT,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise ToolError(f"{name} failed: {err.decode().strip()[-300:]}")
    return out.decode()


def _new_keys() -> str:
    return f"load-{os.getpid()}-{next(_numbers)}"


def _url(target: Target, *, keyed: bool) -> str:
    return f"http://127.0.0.1:{target.http}/api/payments" + ("" if keyed else f"/{target.payment}")


async def http_at_full_speed(target: Target, *, keyed: bool, seconds: float) -> Round:
    """Have each of the connections ask again as soon as it is answered; ``seconds`` is rounded up."""
    script = Path(__file__).with_name("load.lua")
    options = ["-t2", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "-s", str(script), _url(target, keyed=keyed)]
    if keyed:
        options += ["--", _new_keys(), json.dumps(BODY)]
    told = json.loads((await _run("wrk", *options)).splitlines()[-1])
    sent = told["requests"]
    return Round(sent, told["refused"] + told["broken"], sent / told["microseconds"] * 1e6)


async def http_at_fixed_rate(target: Target, *, keyed: bool, rate: int, seconds: float) -> Round:
    """Ask ``rate`` times a second, whether or not the earlier ones were answered."""
    with TemporaryDirectory() as name:
        targets, results = Path(name, "targets"), Path(name, "results")
        lines = _targets(_url(target, keyed=keyed), round(rate * seconds) if keyed else 1, keyed=keyed)
        await asyncio.to_thread(targets.write_text, "".join(f"{line}\n" for line in lines))
        load = [f"-rate={rate}/1s", f"-duration={seconds}s", f"-workers={CONNECTIONS}", "-max-body=0"]
        await _run("vegeta", "attack", "-format=json", f"-targets={targets}", f"-output={results}", *load)
        rows = [row.split(",", 3) for row in (await _run("vegeta", "encode", "-to=csv", str(results))).splitlines()]
    failed = sum(code not in ("200", "201") for _, code, _, _ in rows)
    return _round([float(latency) / 1e9 for _, _, latency, _ in rows], failed, seconds)


def _targets(url: str, number: int, *, keyed: bool) -> Iterator[str]:
    prefix, body = _new_keys(), base64.b64encode(json.dumps(BODY).encode()).decode()
    for each in range(number):
        target = {"method": "POST" if keyed else "GET", "url": url}
        headers = {"Content-Type": ["application/json"], "Idempotency-Key": [f"{prefix}-{each}"]}
        yield json.dumps({**target, "body": body, "header": headers} if keyed else target)


async def grpc_at_full_speed(target: Target, *, keyed: bool, seconds: float) -> Round:
    """Have each of the workers call again as soon as it is answered."""
    return await _ghz(target, [f"--duration={seconds}s", "--duration-stop=wait"], keyed=keyed)


async def grpc_at_fixed_rate(target: Target, *, keyed: bool, rate: int, seconds: float) -> Round:
    """Call ``rate`` times a second, whether or not the earlier calls were answered."""
    return await _ghz(target, ["--async", f"--rps={rate}", f"--total={round(rate * seconds)}"], keyed=keyed)


async def _ghz(target: Target, load: list[str], *, keyed: bool) -> Round:
    call = ["--call", f"{_SERVICE}/{'CreatePayment' if keyed else 'GetPayment'}"]
    call += ["--data", json.dumps(BODY if keyed else {"id": target.payment})]
    if keyed:
        call += ["--metadata", json.dumps({"idempotency-key": f"{_new_keys()}-{{{{.RequestNumber}}}}"})]
    proto = ["--insecure", "--proto", "proto/examples/payments/v1/payments.proto", "--format=json"]
    workers = [f"--concurrency={CONNECTIONS}", "--connections=8"]
    told = json.loads(await _run("ghz", *proto, *workers, *call, *load, f"127.0.0.1:{target.grpc}"))
    failed = sum(number for status, number in told["statusCodeDistribution"].items() if status != "OK")
    return _round([each["latency"] / 1e9 for each in told["details"]], failed, told["total"] / 1e9)


def _round(latencies: list[float], failed: int, seconds: float) -> Round:
    return Round(len(latencies), failed, len(latencies) / seconds, sorted(latencies))
