"""Our probe beside the real grpc_health_probe: the same flags and the same server give the same exit code."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
import pytest_asyncio

from grpc_interceptors import health_server
from resilience import HealthChecker
from resilience.probe.command import main
from tests.foreign.certificates import Authority
from tests.foreign.programs import find_program, run_program

SERVING, BAD_ARGUMENTS, NO_CONNECTION, NO_ANSWER, NOT_SERVING = range(5)
PATIENT = ("-connect-timeout=20s", "-rpc-timeout=20s")
SOON = "-connect-timeout=400ms"  # where it is known that nothing comes

pytestmark = pytest.mark.asyncio(loop_scope="module")  # the servers are there for all tests

REPLIES = {"unset": b"", "unknown": b"\x08\x03", "future": b"\x08\x07", "garbage": b"\xff\xff\xff"}


class Odd(grpc.GenericRpcHandler):
    """A health service that answers by the name that it is asked about, as none of ours would."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:  # noqa: ARG002 - every method is this one
        return grpc.unary_unary_rpc_method_handler(self._check)

    async def _check(self, request: bytes, context: Any) -> bytes:
        name = request[2:].decode()
        metadata = dict(context.invocation_metadata())
        if name == "hangs":
            await asyncio.Event().wait()
        if name == "limited":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        if name == "locked" and (metadata.get("token"), metadata.get("more")) != ("open", "two: words"):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        if name == "agent" and not metadata["user-agent"].startswith("me/1 "):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no such agent")
        return REPLIES.get(name, b"\x08\x01")


async def ailing() -> bool:
    return False


@asynccontextmanager
async def listening(server: grpc.aio.Server, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[int]:
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        pass
    writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def places(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, object]]:
    """Servers and files by the names that the table has for them."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    own = authority.issue("server", "localhost", "127.0.0.1")
    shop = authority.issue("shop", "shop.internal")
    old = authority.issue("old", "localhost", "127.0.0.1", expired=True)
    client = authority.issue("client")
    (folder / "empty.pem").write_text("no certificate\n")
    checker = HealthChecker()
    checker.add_check("stock", ailing, services=("shop.v1.Stock",))
    services = ("shop.v1.Orders", "shop.v1.Stock", "a" * 300)
    tls = grpc.ssl_server_credentials
    mutual = tls([own.pair()], authority.file.read_bytes(), require_client_auth=True)
    odd = grpc.aio.server()
    odd.add_generic_rpc_handlers((Odd(),))
    async with AsyncExitStack() as stack:

        async def serve(credentials: grpc.ServerCredentials | None = None) -> int:
            return await stack.enter_async_context(listening(health_server(checker, services), credentials))

        silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        stack.push_async_callback(silent.wait_closed)
        stack.callback(silent.close)
        deserted = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        found: dict[str, object] = {
            "ours": await serve(),
            "odd": await stack.enter_async_context(listening(odd)),
            "bare": await stack.enter_async_context(listening(grpc.aio.server())),
            "tls": await serve(tls([own.pair()])),
            "shop": await serve(tls([shop.pair()])),
            "old": await serve(tls([old.pair()])),
            "mutual": await serve(mutual),
            "silent": silent.sockets[0].getsockname()[1],
            "nobody": deserted.sockets[0].getsockname()[1],
            "ca": authority.file,
            "cert": client.certificate,
            "key": client.key,
            "otherkey": own.key,
            "empty": folder / "empty.pem",
            "gone": folder / "gone.pem",
        }
        deserted.close()
        yield found


def at(place: str, *flags: str, patient: bool = True) -> list[str]:
    return [f"-addr=127.0.0.1:{{{place}}}", *(PATIENT if patient else (SOON, "-rpc-timeout=20s")), *flags]


def soon(place: str, *flags: str) -> list[str]:
    return at(place, *flags, patient=False)


CA = ("-tls", "-tls-ca-cert={ca}")
PAIR = ("-tls-client-cert={cert}", "-tls-client-key={key}")

ANSWERED: dict[str, tuple[list[str], int]] = {
    "the server serves": (at("ours"), SERVING),
    "a service serves": (at("ours", "-service", "shop.v1.Orders"), SERVING),
    "a service of a long name": (at("ours", f"-service={'a' * 300}"), SERVING),
    "a service doesn't serve": (at("ours", "-service=shop.v1.Stock"), NOT_SERVING),
    "an unknown service": (at("ours", "-service=shop.v1.Nothing"), NO_ANSWER),
    "no host in the address": (["-addr=:{ours}", *PATIENT], SERVING),
    "a host's name": (["-addr", "localhost:{ours}", *PATIENT], SERVING),
    "two dashes": (["--addr=127.0.0.1:{ours}", *(f"-{flag}" for flag in PATIENT)], SERVING),
    "compressed": (at("ours", "-gzip"), SERVING),
    "compressed, said at length": (at("ours", "-gzip=true", "-tls=false", "-v=0"), SERVING),
    "at length": (at("ours", "-v"), SERVING),
    "the last flag counts": (at("ours", "-service=nothing", "-service="), SERVING),
    "headers that are asked for": (
        at("odd", "-service=locked", "-rpc-header", "Token: open", "-rpc-header", "more:  two: words"),
        SERVING,
    ),
    "no headers where they are asked for": (at("odd", "-service=locked"), NO_ANSWER),
    "a header of bytes": (at("odd", "-rpc-header=trace-bin: \x01"), SERVING),
    "a header that can't be": (at("odd", "-rpc-header=a b: c"), NO_ANSWER),
    "a user-agent": (at("odd", "-service=agent", "-user-agent=me/1"), SERVING),
    "a limiter before it": (at("odd", "-service=limited"), NO_ANSWER),
    "no status": (at("odd", "-service=unset"), NOT_SERVING),
    "a status for watchers": (at("odd", "-service=unknown"), NOT_SERVING),
    "a status from the future": (at("odd", "-service=future"), NOT_SERVING),
    "no health reply at all": (at("odd", "-service=garbage"), NO_ANSWER),
    "an answer that never comes": (
        ["-addr=127.0.0.1:{odd}", "-service=hangs", "-connect-timeout=20s", "-rpc-timeout=300ms"],
        NO_ANSWER,
    ),
    "no health service": (at("bare"), NO_ANSWER),
    "nobody listens": (soon("nobody"), NO_CONNECTION),
    "nobody speaks": (soon("silent"), NO_CONNECTION),
    "an address without a port": (["-addr=localhost", SOON], NO_CONNECTION),
    "an address that is none": (["-addr=a b", SOON], NO_CONNECTION),
    "plaintext to TLS": (soon("tls"), NO_CONNECTION),
    "TLS to plaintext": (soon("ours", *CA), NO_CONNECTION),
    "unverified TLS to plaintext": (soon("ours", "-tls", "-tls-no-verify"), NO_CONNECTION),
    "TLS of a known authority": (at("tls", *CA), SERVING),
    "TLS of a known authority, by name": (["-addr=localhost:{tls}", *CA, *PATIENT], SERVING),
    "TLS of an unknown authority": (soon("tls", "-tls"), NO_CONNECTION),
    "TLS unverified": (at("tls", "-tls", "-tls-no-verify"), SERVING),
    "TLS unverified, a service that doesn't serve": (
        at("tls", "-tls", "-tls-no-verify", "-service=shop.v1.Stock"),
        NOT_SERVING,
    ),
    "TLS with another's name": (soon("shop", *CA), NO_CONNECTION),
    "TLS with the name that is meant": (at("shop", *CA, "-tls-server-name=shop.internal"), SERVING),
    "TLS with a name that it hasn't": (soon("tls", *CA, "-tls-server-name=shop.internal"), NO_CONNECTION),
    "TLS with another's name, unverified": (at("shop", "-tls", "-tls-no-verify"), SERVING),
    "TLS that expired": (soon("old", *CA), NO_CONNECTION),
    "TLS that expired, unverified": (at("old", "-tls", "-tls-no-verify"), SERVING),
    "a client's certificate": (at("mutual", *CA, *PAIR), SERVING),
    "a client's certificate, unverified": (at("mutual", "-tls", "-tls-no-verify", *PAIR), SERVING),
    "compressed over TLS": (at("tls", *CA, "-gzip"), SERVING),
}

WRONG: dict[str, list[str]] = {
    "nothing": [],
    "help": ["-h"],
    "no address": ["-v"],
    "an empty address": ["-addr="],
    "a flag without its value": ["-addr"],
    "no such flag": at("ours", "-address=x"),
    "three dashes": at("ours", "---v"),
    "no name": at("ours", "-=v"),
    "no switch": at("ours", "-tls=maybe"),
    "a time without a unit": at("ours", "-rpc-timeout=1"),
    "no time": at("ours", "-rpc-timeout=0s"),
    "a time in the past": at("ours", "-connect-timeout", "-1s"),
    "an endless time": at("ours", "-connect-timeout=9999999999h"),
    "half a header": at("ours", "-rpc-header=token"),
    "verification off without TLS": at("ours", "-tls-no-verify"),
    "an authority without TLS": at("ours", "-tls-ca-cert={ca}"),
    "a name without TLS": at("ours", "-tls-server-name=localhost"),
    "a client's certificate without TLS": at("ours", *PAIR),
    "a certificate without its key": at("tls", *CA, "-tls-client-cert={cert}"),
    "a key without its certificate": at("tls", *CA, "-tls-client-key={key}"),
    "a key of another certificate": at("tls", *CA, "-tls-client-cert={cert}", "-tls-client-key={otherkey}"),
    "an authority and no verification": at("tls", *CA, "-tls-no-verify"),
    "a name and no verification": at("tls", "-tls", "-tls-no-verify", "-tls-server-name=localhost"),
    "an authority that isn't there": at("tls", "-tls", "-tls-ca-cert={gone}"),
    "an authority that is none": at("tls", "-tls", "-tls-ca-cert={empty}"),
    "flags after two dashes": ["--", *at("ours")],
}


def find_probe() -> str:
    return find_program("grpc_health_probe", "grpc-health-probe")


async def test_both_probes_find_the_same(places: dict[str, object]) -> None:
    theirs = find_probe()
    turns = asyncio.Semaphore(6)  # the patience of most is beyond what a busy machine needs

    async def ask(arguments: list[str]) -> tuple[int, int]:
        flags = [argument.format(**places) for argument in arguments]
        async with turns:
            ended = await run_program(theirs, *flags)
            ours = await run_program(sys.executable, "-m", "resilience", "probe", *flags)
        print(flags, f"theirs: {ended.err}ours: {ours.err}", sep="\n")
        assert (ours.out, ours.err.count("\n")) == ("", 1)
        return ended.code, ours.code

    codes = await asyncio.gather(*(ask(arguments) for arguments, _ in ANSWERED.values()))
    assert dict(zip(ANSWERED, codes, strict=True)) == {name: (code, code) for name, (_, code) in ANSWERED.items()}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
async def test_both_probes_refuse_the_same(
    arguments: list[str], places: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [argument.format(**places) for argument in arguments]
    assert (await run_program(find_probe(), *flags)).code == BAD_ARGUMENTS
    assert main(["probe", *flags]) == BAD_ARGUMENTS
    assert capsys.readouterr().err
