"""A gRPC client of raw HTTP/2 frames: it sends what no gRPC library lets through, and stops wherever it likes."""

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

Header = tuple[str | bytes, str | bytes]

_CONFIG = H2Configuration(
    client_side=True,
    header_encoding=None,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
    validate_inbound_headers=False,
)


def message(data: bytes) -> bytes:
    """Return ``data`` as one message on the wire: not compressed, with its length."""
    return struct.pack(">BI", 0, len(data)) + data


@dataclass
class Stream:
    """What came back on one stream."""

    number: int
    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> int | None:
        """The gRPC status, or None where none came."""
        status = self.headers.get("grpc-status")
        return None if status is None else int(status)


class RawClient:
    """One connection. Made by ``raw``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._h2 = H2Connection(_CONFIG)
        self._streams: dict[int, Stream] = {}
        self.closed = asyncio.Event()
        """Whether the server ended the connection."""

    def open(self, path: str | bytes, *headers: Header, body: bytes = b"", end: bool = False) -> Stream:
        """Send the headers of a call, with ``body`` in the same packet; ``end`` says that nothing follows."""
        stream = Stream(self._h2.get_next_available_stream_id())
        self._streams[stream.number] = stream
        fixed: Sequence[Header] = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "test"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
        self._h2.send_headers(stream.number, [*fixed, *headers])
        if body or end:
            self._h2.send_data(stream.number, body, end_stream=end)
        self._flush()
        return stream

    def send(self, stream: Stream, data: bytes, *, end: bool = False) -> None:
        """Send a part of a body."""
        self._h2.send_data(stream.number, data, end_stream=end)
        self._flush()

    def cancel(self, stream: Stream) -> None:
        """Reset the stream, as a client that cancels does."""
        self._h2.reset_stream(stream.number, ErrorCodes.CANCEL)
        self._flush()

    async def call(self, path: str | bytes, *headers: Header, body: bytes = message(b"one")) -> Stream:
        """Make a whole call, and return once it is over."""
        stream = self.open(path, *headers, body=body, end=True)
        await stream.over.wait()
        return stream

    def start(self) -> None:
        """Greet the server."""
        self._h2.initiate_connection()
        self._flush()

    async def listen(self) -> None:
        """Read what comes, until the connection ends."""
        while data := await self._reader.read(65_536):
            for event in self._h2.receive_data(data):
                self._hear(event)
            self._flush()
        self._close()

    def _hear(self, event: object) -> None:
        if isinstance(event, ConnectionTerminated):
            self._close()
        number = getattr(event, "stream_id", None)
        stream = self._streams.get(number) if number is not None else None
        if stream is None:
            return
        if isinstance(event, (ResponseReceived, TrailersReceived)):
            stream.headers.update((name.decode(), value.decode("latin-1")) for name, value in event.headers)
        elif isinstance(event, DataReceived):
            stream.data += event.data
            stream.begun.set()
            self._h2.acknowledge_received_data(event.flow_controlled_length, stream.number)
        elif isinstance(event, StreamReset):
            stream.reset = int(event.error_code)
            stream.over.set()
        elif isinstance(event, StreamEnded):
            stream.over.set()

    def _close(self) -> None:
        self.closed.set()
        for stream in self._streams.values():
            stream.over.set()

    def _flush(self) -> None:
        if not self._writer.is_closing():
            self._writer.write(self._h2.data_to_send())


@asynccontextmanager
async def raw(port: int) -> AsyncIterator[RawClient]:
    """Connect to a server on this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = RawClient(reader, writer)
    client.start()
    listening = asyncio.create_task(client.listen())
    try:
        yield client
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        writer.close()
