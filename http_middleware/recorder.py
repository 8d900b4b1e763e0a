"""Floor 4: a reply on its way out, seen by the policies that want to keep it."""

from starlette.types import Message, Send

from http_middleware.render import kept_metadata
from resilience import wire
from resilience.admission import Admission
from resilience.verdict import Outcome, Reply

_SENT_BY_THE_SERVER = frozenset({"http.response.pathsend", "http.response.zerocopysend"})


class Recorder:
    """Watches a reply leave, and settles the admission before its last byte does."""

    __slots__ = ("_admission", "_body", "_headers", "_send", "_status")

    def __init__(self, admission: Admission, send: Send) -> None:
        self._admission = admission
        self._send = send
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: bytearray | None = bytearray()

    async def __call__(self, message: Message) -> None:
        """Send a message on; before the last one, settle."""
        kind = message["type"]
        if kind == "http.response.start":
            self._status = message["status"]
            self._headers = list(message.get("headers", ()))
        elif kind == "http.response.body":
            self._keep(message.get("body", b""))
        elif kind in _SENT_BY_THE_SERVER:
            self._body = None
        else:
            await self._send(message)  # an announcement: the reply is still to come
            return
        if kind != "http.response.start" and not message.get("more_body", False):
            await self._settle()
        try:
            await self._send(message)
        except Exception:
            # The work is done, though nobody hears of it: a retry must not do it again.
            self._body = None
            await self._settle()
            raise

    def _keep(self, chunk: bytes) -> None:
        if self._body is not None:
            self._body += chunk
            if len(self._body) > self._admission.capture:
                self._body = None

    async def _settle(self) -> None:
        reply = None
        if self._body is not None:
            reply = Reply("http", self._status, kept_metadata(self._headers), bytes(self._body))
        final = wire.is_final_http(self._status)
        await self._admission.settle(Outcome("completed" if final else "failed", reply))
