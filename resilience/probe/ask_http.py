"""A probe over HTTP. Follows no redirect and uses no proxy: the question is about this server."""

import asyncio
import re
import ssl
from time import perf_counter

from resilience.probe.arguments import ProbeOptions
from resilience.probe.ended import NO_ANSWER, NOT_SERVING, SERVING, Ended, answered_late, not_connected

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)(?: [^\r\n]*)?\r?\n")


async def ask_http(options: ProbeOptions, tls: ssl.SSLContext | None) -> Ended:
    """Ask for a page: 2xx is serving, any other status is not serving."""
    started = perf_counter()
    name = (options.tls_server_name or options.host) if tls else None
    try:
        async with asyncio.timeout(options.connect_timeout):
            reader, writer = await asyncio.open_connection(options.host, options.port, ssl=tls, server_hostname=name)
    except OSError as error:
        return not_connected(options, error)
    connected = perf_counter()
    try:
        async with asyncio.timeout(options.rpc_timeout):
            writer.write(_request(options))
            status = await _status(reader)
    except TimeoutError:
        return answered_late(options)
    except (OSError, ValueError):
        return Ended(NO_ANSWER, f"error: what {options.addr} answers is not HTTP/1")
    finally:
        writer.transport.abort()
    took = f" (connect={connected - started:.3f}s answer={perf_counter() - connected:.3f}s)" if options.v else ""
    if 200 <= status < 300:
        return Ended(SERVING, f"status: {status}{took}")
    return Ended(NOT_SERVING, f"service unhealthy (responded with {status}){took}")


def _request(options: ProbeOptions) -> bytes:
    headers = {"Host": options.addr, "User-Agent": options.user_agent, "Accept": "*/*", "Connection": "close"}
    given = {name.lower() for name, _ in options.rpc_header}
    pairs = [*((name, value) for name, value in headers.items() if name.lower() not in given), *options.rpc_header]
    lines = [f"GET {options.path} HTTP/1.1", *(f"{name}: {value}" for name, value in pairs), "", ""]
    return "\r\n".join(lines).encode()


async def _status(reader: asyncio.StreamReader) -> int:
    while True:
        match = _STATUS_LINE.fullmatch(await reader.readline())
        if match is None:
            raise ValueError
        if not match[1].startswith(b"1"):
            return int(match[1])
        while (await reader.readline()).strip():
            pass  # the headers of an interim answer
