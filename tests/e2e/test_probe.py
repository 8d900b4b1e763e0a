"""The probe over HTTP, and against the running demo over both protocols."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from examples.payments.launch import launch
from grpc_interceptors import health_server
from resilience import HealthChecker
from resilience.probe.arguments import parse
from resilience.probe.command import main

ROOT = Path(__file__).parents[2]
SERVING, BAD_ARGUMENTS, NO_CONNECTION, NO_ANSWER, NOT_SERVING = range(5)
PATIENT = ("-connect-timeout=20s", "-rpc-timeout=20s")
HASTY = ("-connect-timeout=20s", "-rpc-timeout=200ms")


class Canned:
    """A server that sends the same bytes to everyone, and keeps what it was asked."""

    def __init__(self, reply: bytes, *, hang_up: bool = True) -> None:
        self.asked: list[bytes] = []
        self._reply = reply
        self._hang_up = hang_up

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self._reply)
        if not self._hang_up:
            await reader.read()  # until the probe has left
        writer.close()


@asynccontextmanager
async def served(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def probed(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["probe", *arguments])


async def run_probe(*arguments: str) -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "resilience", "probe", *arguments, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    return process.returncode or 0, said


ANSWERS = {
    "200": (b"HTTP/1.1 200 OK\r\n\r\n", SERVING, "status: 200"),
    "204 without a reason": (b"HTTP/1.0 204\r\n\r\n", SERVING, "status: 204"),
    "hints before it": (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", SERVING, "status: 200"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", NOT_SERVING, "service unhealthy (responded with 302)"),
    "not found": (b"HTTP/1.1 404 Not Found\r\n\r\n", NOT_SERVING, "service unhealthy (responded with 404)"),
    "503": (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", NOT_SERVING, "service unhealthy (responded with 503)"),
    "nothing": (b"", NO_ANSWER, "is not HTTP/1"),
    "another protocol": (b"+PONG\r\n", NO_ANSWER, "is not HTTP/1"),
    "half a line": (b"HTTP/1.1 200", NO_ANSWER, "is not HTTP/1"),
    "a line without an end": (b"HTTP/1.1 200 " + b"x" * 100_000, NO_ANSWER, "is not HTTP/1"),
}


@pytest.mark.parametrize(("reply", "code", "said"), ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_over_http_has_its_exit_code_and_one_line(
    reply: bytes, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with served(Canned(reply)) as port:
        assert await probed(f"http://127.0.0.1:{port}/", *PATIENT) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


async def test_a_server_that_never_answers_costs_the_time_of_the_answer() -> None:
    async with served(Canned(b"", hang_up=False)) as port:
        assert await probed(f"http://127.0.0.1:{port}/", *HASTY) == NO_ANSWER


async def test_hints_without_an_end_cost_the_time_of_the_answer() -> None:
    async def hint(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.transport.is_closing():
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            try:
                await writer.drain()
            except ConnectionError:
                break

    async with served(hint) as port:
        assert await probed(f"http://127.0.0.1:{port}/", *HASTY) == NO_ANSWER


async def test_nobody_who_listens_is_no_connection() -> None:
    async with served(Canned(b"")) as port:
        pass
    assert await probed(f"http://127.0.0.1:{port}/", *PATIENT) == NO_CONNECTION


async def test_tls_to_a_server_without_it_is_no_connection() -> None:
    async with served(Canned(b"HTTP/1.1 200 OK\r\n\r\n")) as port:
        target = f"https://127.0.0.1:{port}/"
        codes = {await probed(target, *flags, "-connect-timeout=200ms") for flags in ((), ("-tls-no-verify",))}
    assert codes == {NO_CONNECTION}


async def test_the_request_carries_the_path_and_the_headers() -> None:
    answer = Canned(b"HTTP/1.1 200 OK\r\n\r\n")
    async with served(answer) as port:
        target = f"http://127.0.0.1:{port}/health/réady?fresh=1#part"
        assert await probed(target, "-rpc-header", "Authorization:  Bearer t", "-rpc-header=host: shop", *PATIENT) == 0
    line, *headers = answer.asked[0].decode().split("\r\n")
    assert line == "GET /health/r%C3%A9ady?fresh=1 HTTP/1.1"
    assert "Authorization: Bearer t" in headers
    assert [header for header in headers if header.lower().startswith("host:")] == ["host: shop"]


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with served(Canned(b"HTTP/1.1 200 OK\r\n\r\n")) as port:
        assert await probed(f"http://127.0.0.1:{port}/", *PATIENT) == SERVING


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-h"],
        ["ftp://host/"],
        ["127.0.0.1:80"],
        ["http://"],
        ["http://host:99999/"],
        ["http://[::1/"],
        ["http://user:word@host/"],
        ["grpc://host"],
        ["grpc://host:1/a?b=c"],
        ["grpc://host:1/a", "-service=b"],
        ["grpc://host:1", "-addr=host:1"],
        ["grpc://host:1", "grpc://host:1"],
        ["http://host/", "-service=a"],
        ["http://host/", "-gzip"],
        ["http://host/", "-rpc-header=a b: c"],
        ["http://host/", "-rpc-header=a: b\r\nc: d"],
        ["http://host/", "-user-agent=é"],
        ["http://host/", "-tls-no-verify"],
        ["http://host/", "-rpc-timeout=1"],
    ],
)
def test_wrong_arguments_exit_with_1_and_ask_nobody(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *arguments]) == BAD_ARGUMENTS
    assert "Traceback" not in capsys.readouterr().err


def test_the_secret_of_a_target_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    main(["probe", "http://user:s3cr3t@host/"])
    assert "s3cr3t" not in capsys.readouterr().err


def test_nobody_to_tell_changes_no_exit_code() -> None:
    command = [sys.executable, "-m", "resilience", "probe", "http://127.0.0.1:1/"]
    closed = subprocess.run(["/bin/sh", "-c", '"$@" 2>&-', "sh", *command], cwd=ROOT, check=False)
    assert closed.returncode == NO_CONNECTION


def test_no_command_is_help_and_not_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == BAD_ARGUMENTS
    assert capsys.readouterr().err.startswith("usage: python -m resilience probe")


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("1s", 1), ("500ms", 0.5), ("1m30s", 90), (".5s", 0.5), ("1.h", 3600), ("2h45m", 9900), ("7us", 7e-6)],
)
def test_durations_are_read_as_go_reads_them(duration: str, seconds: float) -> None:
    assert parse(["http://host/", f"-rpc-timeout={duration}"]).rpc_timeout == pytest.approx(seconds)


@pytest.mark.parametrize("duration", ["", "1", "s", ".s", "0", "0s", "-1s", "1 s", "1x", "1e3s", "inf", "9999999999h"])
def test_what_is_no_duration_is_a_wrong_argument(duration: str) -> None:
    assert main(["probe", "http://host/", f"-rpc-timeout={duration}"]) == BAD_ARGUMENTS


def test_flags_may_follow_the_target_and_switches_take_no_word() -> None:
    options = parse(["-tls", "grpc://[::1]:5000/shop.v1.Orders", "--rpc-timeout", "2s", "-tls-no-verify=T"])
    assert (options.addr, options.service) == ("[::1]:5000", "shop.v1.Orders")
    assert (options.tls, options.tls_no_verify, options.rpc_timeout) == (True, True, 2)


def test_a_probe_over_http_imports_no_grpc() -> None:
    code = "from resilience.probe.command import main; main(['probe', 'http://127.0.0.1:1/'])"
    check = "import sys; assert 'grpc' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], cwd=ROOT, check=True)


def test_without_grpc_a_probe_over_it_names_the_extra() -> None:
    without = "import sys; sys.modules['grpc'] = None"
    code = f"{without}; from resilience.probe.command import main; sys.exit(main(['probe', 'grpc://127.0.0.1:1']))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert ended.returncode == BAD_ARGUMENTS
    assert b"grpc-http-resilience[grpc]" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["-v"], SERVING, "status: SERVING (connect="),
        (["-service=shop.v1.Orders", "-gzip"], SERVING, "status: SERVING"),
        (["-service=shop.v1.Stock"], NOT_SERVING, "service unhealthy (responded with NOT_SERVING)"),
        (["-service=" + "a" * 300], NO_ANSWER, "error: health rpc failed: NOT_FOUND: Unknown service"),
        (["-rpc-header=a b: c"], NO_ANSWER, "can't be sent"),
        (["-tls", "-tls-no-verify", "-connect-timeout=200ms"], NO_CONNECTION, "timeout: no connection to 127.0.0.1:"),
    ],
)
async def test_an_answer_over_grpc_has_its_exit_code_and_one_line(
    flags: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # the probe would set it for good
    checker = HealthChecker()
    checker.add_check("stock", lambda: False, services=("shop.v1.Stock",))
    server = health_server(checker, ["shop.v1.Orders"])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        assert await probed(f"grpc://127.0.0.1:{port}", *PATIENT, *flags) == code
    finally:
        await server.stop(None)
    assert said in capsys.readouterr().err


async def test_the_demo_passes_until_it_drains_over_both_protocols(tmp_path: Path) -> None:
    async with launch(tmp_path / "log", HEALTH_DRAIN_SECONDS="60") as demo:
        targets = [f"{demo.http}/health/ready", f"grpc://{demo.grpc}/examples.payments.v1.PaymentService"]
        before = await asyncio.gather(*(run_probe(target, *PATIENT) for target in targets))
        demo.process.send_signal(signal.SIGTERM)
        # The signal has arrived once this answers: the probe's 4 is waited for, and not slept for.
        async with asyncio.timeout(20):
            while (await run_probe(targets[0], *PATIENT))[0] == SERVING:
                pass
        after = await asyncio.gather(*(run_probe(target, *PATIENT) for target in targets))
        # The end of the block is the second signal, which cuts the delay short.
    assert before == [(SERVING, b"status: 200\n"), (SERVING, b"status: SERVING\n")]
    assert after == [
        (NOT_SERVING, b"service unhealthy (responded with 503)\n"),
        (NOT_SERVING, b"service unhealthy (responded with NOT_SERVING)\n"),
    ]
