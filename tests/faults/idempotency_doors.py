"""Clients of both doors that tell what they were answered in the same words."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import httpx
from google.protobuf.struct_pb2 import Struct
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from tests.faults.idempotency_server import SERVICE

PAYLOAD: Mapping[str, Any] = {"item": "book", "amount": 100}
OTHER: Mapping[str, Any] = {"item": "book", "amount": 10_000}
_PATIENCE = 20.0  # Seconds.


@dataclass(frozen=True)
class Answer:
    """What a client knows once a call is over.

    Args:
        told: ``ran``, ``replayed``, the reason of a refusal, ``failed`` (the application did), ``lost``.
        status: as the protocol names it.
        run: whose reply it is, where it has one.
        body: the reply's bytes.
        metadata: headers or trailers.
    """

    told: str
    status: str = ""
    run: str = ""
    body: bytes = b""
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def get_all(self, name: str) -> list[str | bytes]:
        return [value for key, value in self.metadata if key == name]


def tally(answers: Iterable[Answer]) -> dict[str, int]:
    """Count what clients were told."""
    return dict(Counter(answer.told for answer in answers))


class Addresses(Protocol):
    """Where a process serves."""

    @property
    def http(self) -> httpx.AsyncClient: ...

    @property
    def channel(self) -> grpc.aio.Channel: ...


class Door(Protocol):
    """One way in."""

    name: str
    waits: bool

    async def post(
        self,
        worker: Addresses,
        key: str,
        *,
        to: str = "reexecute",
        payload: Mapping[str, Any] = PAYLOAD,
        caller: str = "alice",
        patience: float = _PATIENCE,
        **behave: Any,
    ) -> Answer:
        """Place an order. Who cancels this hangs up."""
        ...


class HttpDoor:
    name = "http"
    waits = False

    async def post(
        self,
        worker: Addresses,
        key: str,
        *,
        to: str = "reexecute",
        payload: Mapping[str, Any] = PAYLOAD,
        caller: str = "alice",
        patience: float = _PATIENCE,
        **behave: Any,
    ) -> Answer:
        headers = {"idempotency-key": key, "x-api-key": caller, "accept": "application/problem+json"}
        headers["x-behave"] = json.dumps(behave)
        content = json.dumps(dict(payload)).encode()
        headers["content-type"] = "application/json"
        try:
            reply = await worker.http.post(f"/{to}", content=content, headers=headers, timeout=patience)
        except httpx.HTTPError:
            return Answer("lost")
        metadata = tuple((name.lower(), value) for name, value in reply.headers.multi_items())
        status = str(reply.status_code)
        if reply.headers["content-type"] == "application/problem+json":
            return Answer(reply.json()["code"], status, metadata=metadata)
        if reply.status_code >= 500:
            return Answer("failed", status, metadata=metadata)
        told = "replayed" if "x-idempotent-replayed" in reply.headers else "ran"
        return Answer(told, status, reply.json().get("run", ""), reply.content, metadata)


class GrpcDoor:
    name = "grpc"
    waits = True

    async def post(
        self,
        worker: Addresses,
        key: str,
        *,
        to: str = "reexecute",
        payload: Mapping[str, Any] = PAYLOAD,
        caller: str = "alice",
        patience: float = _PATIENCE,
        **behave: Any,
    ) -> Answer:
        pairs = (("idempotency-key", key), ("x-api-key", caller), ("x-behave", json.dumps(behave)))
        sent = b"".join(_field(name, value) for name, value in payload.items())
        path = f"/{SERVICE}/{to}"
        body = b""
        channel: Any = worker.channel
        start = channel.unary_stream(path) if to == "stream" else channel.unary_unary(path)
        call = start(sent, metadata=pairs, timeout=patience)
        try:
            body = b"".join([part async for part in call]) if to == "stream" else await call
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            call.cancel()
            raise
        code = await call.code()
        metadata = tuple(await call.trailing_metadata() or ())
        return _read(code, await call.details() or "", body, metadata)


def _field(name: str, value: Any) -> bytes:
    # One message of one field; one after the other they are the whole, in just this order.
    message = Struct()
    message[name] = value
    return message.SerializeToString()


def _read(code: grpc.StatusCode, details: str, body: bytes, metadata: tuple[tuple[str, str | bytes], ...]) -> Answer:
    found = [value for name, value in metadata if name == "grpc-status-details-bin"]
    if found:
        assert isinstance(found[0], bytes)
        info = ErrorInfo()
        Status.FromString(found[0]).details[0].Unpack(info)
        return Answer(info.reason.lower(), code.name, metadata=metadata)
    told = "replayed" if any(name == "x-idempotent-replayed" for name, _ in metadata) else "ran"
    match code:
        case grpc.StatusCode.OK:
            return Answer(told, code.name, str(Struct.FromString(body)["run"]), body, metadata)
        case grpc.StatusCode.NOT_FOUND:
            return Answer(told, code.name, details, details.encode(), metadata)
        case _ if any(name == "x-request-id" for name, _ in metadata):
            return Answer("failed", code.name, metadata=metadata)
        case _:
            return Answer("lost", code.name)


DOORS: dict[str, Door] = {"http": HttpDoor(), "grpc": GrpcDoor()}
