"""What a benchmark ran on: the processor, the interpreter, and every package that is measured or measured with."""

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.support.redis_servers import binaries

_OURS = ("grpcio", "protobuf", "fastapi", "starlette", "pydantic", "redis", "hiredis")
_BESIDE = ("grpc-interceptor", "opentelemetry-instrumentation-grpc")
_PEERS = Path(__file__).with_name("requirements-peers.in")


def describe() -> list[tuple[str, str]]:
    """Return names and values; nothing that names the host."""
    described = [
        ("CPU", f"{_cpu()}, {os.cpu_count()} cores"),
        ("System", f"{platform.system()} {platform.machine()}"),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()}), asyncio's own event loop"),
        ("Redis", ", ".join(binaries()) or "no redis-server found"),
        ("Packages", ", ".join(f"{name} {_version(name)}" for name in _OURS)),
        ("Peers", ", ".join(f"{name} {_version(name)}" for name in (*_BESIDE, *peers()))),
    ]
    with suppress(OSError):
        described.append(("Load at the start", f"{os.getloadavg()[0]:.1f}: above 1, others were at work"))
    return described


def peers() -> list[str]:
    """Return what ``requirements-peers.in`` pins."""
    return re.findall(r"^([A-Za-z0-9._-]+)==", _PEERS.read_text(), re.MULTILINE)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    with suppress(OSError):
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if models:
            return str(models[0])
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - fixed
    return platform.processor() or "unknown"
