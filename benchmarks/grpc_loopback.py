"""Whole RPCs: servers in this process, whose CPU counts, and their client in another, whose CPU does not."""

import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from time import process_time, thread_time
from typing import Any

import grpc

from examples.payments.v1 import payments_pb2 as pb

CREATE = "/examples.payments.v1.PaymentService/CreatePayment"
_TIMES = 100  # in one go, so that the clock's own cost is none of it


def create_handler(inner: Any = None) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return a handler of ``CreatePayment`` that only answers, or ``inner`` as one."""
    reply = pb.Payment(id="pay_1", amount=100, currency="EUR", status="accepted")

    async def create(_request: pb.CreatePaymentRequest, _context: Any) -> pb.Payment:
        return reply

    return grpc.unary_unary_rpc_method_handler(
        inner or create, pb.CreatePaymentRequest.FromString, pb.Payment.SerializeToString
    )


async def over_loopback(
    chains: Mapping[str, Sequence[Any]], *, rounds: int, calls: int, tasks: int
) -> dict[str, float]:
    """Return the CPU microseconds that one RPC costs a server with each chain of interceptors: the least of all rounds.

    Args:
        rounds: in turns, after one that doesn't count.
        calls: in one round.
        tasks: so many at once.
    """
    async with AsyncExitStack() as stack:
        ports = [await _serve(stack, create_handler(), chain) for chain in chains.values()]
        ask = await _client(stack, ports)
        seen: dict[str, list[float]] = {name: [] for name in chains}
        for turn in range(rounds + 1):
            print(f"\r  loopback: round {turn} of {rounds} ", end="", file=sys.stderr, flush=True)
            for place, name in enumerate(chains):
                started = process_time()
                await ask(f"{place} {calls} {tasks}")
                if turn:
                    seen[name].append((process_time() - started) / calls * 1e6)
        print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)
    return {name: min(figures) for name, figures in seen.items()}


async def context_costs(
    names: Iterable[str], trailers: tuple[tuple[str, str], ...], *, rounds: int
) -> dict[str, float]:
    """Return the CPU microseconds of each method of the real servicer context, called in a handler."""
    least = dict.fromkeys(names, float("inf"))

    async def probe(_request: pb.CreatePaymentRequest, context: Any) -> pb.Payment:
        for name in least:
            method = getattr(context, name)
            ask = partial(method, trailers) if name == "set_trailing_metadata" else method
            started = thread_time()
            for _ in range(_TIMES):
                ask()
            least[name] = min(least[name], (thread_time() - started) / _TIMES * 1e6)
        return pb.Payment()

    async with AsyncExitStack() as stack:
        port = await _serve(stack, create_handler(probe), ())
        ask = await _client(stack, [port])
        await ask(f"0 {rounds} 1")
    return least


async def _serve(stack: AsyncExitStack, handler: "grpc.RpcMethodHandler[Any, Any]", interceptors: Sequence[Any]) -> int:
    server = grpc.aio.server(interceptors=interceptors)
    service, _, method = CREATE[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return port


async def _client(stack: AsyncExitStack, ports: Sequence[int]) -> Any:
    """Start the client; return a function that has it do a round, and waits for its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, *map(str, ports), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("the client has no pipes")

    async def leave() -> None:
        stdin.close()
        await process.wait()

    stack.push_async_callback(leave)

    async def ask(line: str) -> None:
        stdin.write(line.encode() + b"\n")
        if await stdout.readline() != b"done\n":
            raise RuntimeError("the client failed")

    return ask


async def _be_client(ports: Sequence[str]) -> None:
    request = pb.CreatePaymentRequest(amount=100, currency="EUR")
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) for port in ports]
        stubs: list[Any] = [
            channel.unary_unary(CREATE, pb.CreatePaymentRequest.SerializeToString, pb.Payment.FromString)
            for channel in channels
        ]
        while line := await asyncio.to_thread(sys.stdin.readline):
            place, calls, tasks = map(int, line.split())
            await asyncio.gather(*(_calls(stubs[place], request, calls // tasks) for _ in range(tasks)))
            print("done", flush=True)


async def _calls(stub: Any, request: pb.CreatePaymentRequest, times: int) -> None:
    for _ in range(times):
        await stub(request)


if __name__ == "__main__":
    asyncio.run(_be_client(sys.argv[1:]))
