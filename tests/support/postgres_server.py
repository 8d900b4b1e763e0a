"""A real PostgreSQL for tests: started on a free port, stopped by pid, never mocked."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psycopg
import pytest

from tests.support.redis_servers import free_port

_START = 20.0
_OWNER = "postgres"  # Debian's user; the server refuses to run as root.


def folder() -> Path:
    """Return where ``initdb`` and ``postgres`` are; skip the test where there are none, or fail it in CI."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve().parent] if on_path else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    reason = "" if found else "no PostgreSQL server on PATH or in /usr/lib/postgresql"
    if found and os.geteuid() == 0 and not _has_owner():
        reason = f"a PostgreSQL server does not run as root, and there is no user {_OWNER!r}"
    if reason:
        if os.environ.get("REQUIRE_POSTGRES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found[0]


def _has_owner() -> bool:
    try:
        pwd.getpwnam(_OWNER)
    except KeyError:
        return False
    return True


class PostgresServer:
    """One server process and its backends. ``with`` starts and ends it.

    Args:
        binaries: the folder of ``initdb`` and ``postgres``.
    """

    def __init__(self, binaries: Path) -> None:
        self.port = free_port()
        self.address = f"app@127.0.0.1:{self.port}/postgres"
        self._binaries = binaries
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[bytes] | None = None
        self._user: str | None = None
        self._group: int | None = None
        if os.geteuid() == 0:
            owner = pwd.getpwnam(_OWNER)
            self._user, self._group = _OWNER, owner.pw_gid
            os.chown(self._folder.name, owner.pw_uid, owner.pw_gid)
        data = ("--pgdata", f"{self._folder.name}/data", "--username", "app", "--auth", "trust")
        self._run("initdb", *data, "--no-sync", "--encoding", "UTF8", "--locale", "C").wait()

    def _run(self, name: str, *options: str) -> "subprocess.Popen[bytes]":
        with Path(self._folder.name, "log").open("ab") as log:
            return subprocess.Popen(
                [self._binaries / name, *options],
                cwd=self._folder.name,
                stdout=log,
                stderr=log,
                user=self._user,
                group=self._group,
                extra_groups=None if self._user is None else [],
            )

    def start(self) -> None:
        """Start the process, with what it held before, and wait until it answers."""
        where = ("-D", f"{self._folder.name}/data", "-k", self._folder.name, "-p", str(self.port))
        quick = ("-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=30")
        self._process = self._run("postgres", *where, "-c", "listen_addresses=127.0.0.1", *quick)
        until = time.monotonic() + _START
        while True:
            try:
                psycopg.connect(f"postgresql://{self.address}", connect_timeout=2).close()
            except psycopg.OperationalError:
                assert self._process.poll() is None, Path(self._folder.name, "log").read_text()
                assert time.monotonic() < until, Path(self._folder.name, "log").read_text()
                time.sleep(0.01)
            else:
                return

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and to each of its backends."""
        assert self._process is not None
        for pid in (self._process.pid, *self._backends()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _backends(self) -> list[int]:
        assert self._process is not None
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        """End the server and its backends as a power cut does."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)  # the server first, so that it starts no new ones
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()
