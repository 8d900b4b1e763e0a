"""A probe over gRPC: one ``Health/Check``. The one room of the core that imports ``grpc``, and only to ask."""

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from resilience.errors import ConfigurationError
from resilience.probe.arguments import ProbeOptions
from resilience.probe.ended import NO_ANSWER, NOT_SERVING, SERVING, Ended, answered_late, not_connected

if TYPE_CHECKING:
    import grpc

_CHECK = "/grpc.health.v1.Health/Check"
_NAME = re.compile(r"[0-9a-z_.-]+")
_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


async def ask_grpc(options: ProbeOptions, tls: ssl.SSLContext | None) -> Ended:
    """Ask for the status of a service, or of the whole server.

    Raises:
        ConfigurationError: ``grpcio`` isn't installed.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else each attempt to connect is told, too
    try:
        import grpc  # noqa: PLC0415 - who asks over HTTP needs no extra
    except ImportError:
        raise ConfigurationError("gRPC needs the extra: pip install 'grpc-http-resilience[grpc]'") from None
    how: dict[str, Any] = {
        "options": _channel_options(options),
        "compression": grpc.Compression.Gzip if options.gzip else None,
    }
    address = f"localhost{options.addr}" if options.addr.startswith(":") else options.addr
    if tls is None:
        async with grpc.aio.insecure_channel(address, **how) as channel:
            return await _check(options, channel)
    if not options.tls_no_verify:
        credentials = grpc.ssl_channel_credentials(**_files(options))
        async with grpc.aio.secure_channel(address, credentials, **how) as channel:
            return await _check(options, channel)
    how["options"].append(("grpc.default_authority", address))
    async with _unverified(address, tls) as through, grpc.aio.insecure_channel(through, **how) as channel:
        return await _check(options, channel)


def _channel_options(options: ProbeOptions) -> list[tuple[str, Any]]:
    told: list[tuple[str, Any]] = [
        ("grpc.primary_user_agent", options.user_agent),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.service_config_disable_resolution", 1),
    ]
    if options.tls_server_name:
        told.append(("grpc.ssl_target_name_override", options.tls_server_name))
    return told


def _files(options: ProbeOptions) -> dict[str, bytes | None]:
    # grpc would trust a list of its own where none is given; an operator means the system's.
    trusted = options.tls_ca_cert or ssl.get_default_verify_paths().cafile
    return {
        "root_certificates": Path(trusted).read_bytes() if trusted else None,
        "private_key": Path(options.tls_client_key).read_bytes() if options.tls_client_key else None,
        "certificate_chain": Path(options.tls_client_cert).read_bytes() if options.tls_client_cert else None,
    }


async def _check(options: ProbeOptions, channel: "grpc.aio.Channel") -> Ended:
    import grpc  # noqa: PLC0415 - as above

    metadata = _metadata(options)
    ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_CHECK)
    started = perf_counter()
    try:
        async with asyncio.timeout(options.connect_timeout):
            await channel.channel_ready()
    except TimeoutError as error:
        return not_connected(options, error)
    connected = perf_counter()
    if not all(_NAME.fullmatch(name) for name, _ in metadata):
        return Ended(NO_ANSWER, "error: health rpc failed: -rpc-header has a name that can't be sent")
    try:
        reply = await ask(_request(options.service), timeout=options.rpc_timeout, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return answered_late(options)
        return Ended(NO_ANSWER, f"error: health rpc failed: {error.code().name}: {error.details()}")
    took = f" (connect={connected - started:.3f}s rpc={perf_counter() - connected:.3f}s)" if options.v else ""
    status = _status(reply)
    if status is None:
        return Ended(NO_ANSWER, "error: health rpc failed: the reply is no HealthCheckResponse")
    if status == "SERVING":
        return Ended(SERVING, f"status: {status}{took}")
    return Ended(NOT_SERVING, f"service unhealthy (responded with {status}){took}")


def _metadata(options: ProbeOptions) -> list[tuple[str, str | bytes]]:
    pairs = [(name.lower(), value) for name, value in options.rpc_header]
    return [(name, value.encode() if name.endswith("-bin") else value) for name, value in pairs]


def _request(service: str) -> bytes:
    # A HealthCheckRequest by hand: field 1, a string. Its generated class would cost the start more than the call.
    text = service.encode()
    if not text:
        return b""
    length, left = [], len(text)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes([10, *length, left]) + text


def _status(reply: bytes) -> str | None:
    # A HealthCheckResponse: field 1, an enum, left out where it is 0.
    if not reply:
        return _STATUSES[0]
    if len(reply) != 2 or reply[0] != 8 or reply[1] > 127:
        return None
    return _STATUSES[reply[1]] if reply[1] < len(_STATUSES) else str(reply[1])


@asynccontextmanager
async def _unverified(address: str, tls: ssl.SSLContext) -> AsyncIterator[str]:
    # grpc verifies, always. So it speaks plaintext to a port of this process, which speaks TLS to the server.
    host, _, port = address.rpartition(":")
    tls.set_alpn_protocols(["h2"])

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=tls)
            if far_writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2":
                await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except (OSError, ValueError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.transport.abort()
