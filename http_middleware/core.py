"""Floor 4: the inner stage. Asks for limits and keys where the caller is known: right before the router."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio.from_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_middleware.call import Body, ClientGoneError, rename_call
from http_middleware.render import (
    kept_metadata,
    refuse_websocket,
    render_client_gone,
    render_reject,
    render_reply,
)
from resilience import wire
from resilience.admission import Admission, Policy, Refused
from resilience.pipeline import Pipeline
from resilience.policies.idempotency import MAX_PAYLOAD, IdempotencyPolicy
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Reply, Verdict

ADMISSION = "resilience.admission"
OPERATION = "resilience.operation"
_CORE = "resilience.core"
_SENT_BY_THE_SERVER = frozenset({"http.response.pathsend", "http.response.zerocopysend"})


class CoreMiddleware:
    """The inner stage. Stands inside of authentication, and outside of the router and of error handlers.

    Args:
        app: the application inside.
        pipeline: whose core policies it asks. Each pipeline's are asked once for a request, however often they stand
            in its way.
    """

    def __init__(self, app: ASGIApp, pipeline: Pipeline) -> None:
        self.app = app
        self._groups: list[Sequence[Policy]] = [pipeline.core]

    def join(self, pipeline: Pipeline) -> None:
        """Ask another pipeline's core policies, too: limits before keys, so that what is refused claims nothing."""
        if pipeline.core and all(group is not pipeline.core for group in self._groups):
            groups = [group for group in (*self._groups, pipeline.core) if group]
            self._groups = sorted(groups, key=_has_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the core policies on the admission that the edge opened."""
        admission: Admission | None = scope.get(ADMISSION)
        if admission is None:
            await self.app(scope, receive, send)
            return
        first = _CORE not in scope
        groups = self._groups
        if not first:
            groups = [group for group in groups if all(asked is not group for asked in admission.asked)]
            if not groups:
                await self.app(scope, receive, send)
                return
        scope[_CORE] = True
        admission.asked += groups
        rename_call(admission.call, scope, scope[OPERATION])
        user = scope.get("user")
        if user is not None:
            _adopt(user, admission)
        if scope["type"] == "http":
            await self._guard(groups, first, admission, scope, receive, send)
            return
        verdict = await _ask(groups, admission)
        if isinstance(verdict, Reject):
            await refuse(verdict, admission, scope, send)
        else:
            await self.app(scope, receive, send)

    async def _guard(
        self,
        groups: Sequence[Sequence[Policy]],
        first: bool,
        admission: Admission,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        if first:
            body = Body(admission.call.metadata, receive)
            admission.call.payload = body.read
        try:
            verdict = await (admission.admit(groups[0]) if len(groups) == 1 else _ask(groups, admission))
        except ClientGoneError:
            await render_client_gone(send)
            return
        if verdict is not PROCEED:
            await _render(verdict, admission, send)
        elif first:
            keep = MAX_PAYLOAD if _may_be_keyed(admission) else 0
            await self._serve(admission, scope, body.receiver(keep), send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, admission: Admission, scope: Scope, receive: Receive, send: Send) -> None:
        admission.from_thread = _from_thread
        outgoing = _Outgoing(admission, send)
        try:
            await self.app(scope, receive, outgoing)
        except Refused:
            pass  # the verdict is the admission's
        except ClientGoneError:
            # A policy that was asked in the handler found no whole body.
            await admission.settle(Outcome("failed"))
            if not outgoing.started:
                await render_client_gone(send)
            return
        except Exception:
            # Before the error handler further out answers: who retries on its answer must find the key free.
            if admission.capture:
                await admission.settle(Outcome("failed"))
            raise
        if admission.verdict is not PROCEED and not outgoing.started:
            await _render(admission.verdict, admission, send)


async def refuse(reject: Reject, admission: Admission, scope: Scope, send: Send) -> None:
    """Refuse a request or a handshake."""
    if scope["type"] == "websocket":
        await refuse_websocket(reject, scope.get("extensions") or (), admission, send)
    else:
        await _render(reject, admission, send)


async def _ask(groups: Sequence[Sequence[Policy]], admission: Admission) -> Verdict:
    verdict: Verdict = PROCEED
    for group in groups:
        verdict = await admission.admit(group)
        if verdict is not PROCEED:
            break
    return verdict


async def _render(verdict: Verdict, admission: Admission, send: Send) -> None:
    if isinstance(verdict, Replay):
        await render_reply(verdict.reply, send)
    elif isinstance(verdict, Reject):
        # A stage of a mounted application may have refused already, in an answer that never left.
        admission.metadata[:] = [pair for pair in admission.metadata if pair[0] != wire.RETRY_AFTER]
        await render_reject(verdict, admission, send)


def _adopt(user: Any, admission: Admission) -> None:
    """Name the caller as Starlette's AuthenticationMiddleware found it, unless the application has named one.

    Never by ``display_name``, which two users may share: they would share their keys, and see each other's replies.
    """
    context = admission.context
    if not context or context.user_id is not None or getattr(user, "is_authenticated", None) is not True:
        return
    try:
        identity = user.identity
    except (AttributeError, NotImplementedError):
        # Starlette's base class leaves it open, and its SimpleUser once did.
        identity = getattr(user, "username", None)
    if identity:
        context.set_user(str(identity))


def _has_keys(policies: Sequence[Policy]) -> bool:
    return any(isinstance(getattr(policy, "policy", policy), IdempotencyPolicy) for policy in policies)


def _may_be_keyed(admission: Admission) -> bool:
    return not admission.call.safe and admission.call.metadata.get(wire.IDEMPOTENCY_KEY) is not None


def _from_thread(admit: Callable[[], Awaitable[Verdict]]) -> Verdict:
    async def ask() -> Verdict:
        return await admit()

    return anyio.from_thread.run(ask)


class _Outgoing:
    """Lets a reply leave, through a recorder if by then a policy wants to see it.

    What a handler made of a refusal by one of its own policies (a mounted application's error page, say) is dropped.
    """

    __slots__ = ("_admission", "_send", "started")

    def __init__(self, admission: Admission, send: Send) -> None:
        self._admission = admission
        self._send = send
        self.started = False

    def __call__(self, message: Message) -> Awaitable[None]:
        # No coroutine of its own: nothing is awaited here, and every message of every reply comes by.
        if not self.started:
            if self._admission.verdict is not PROCEED:
                return _drop()
            if message["type"] == "http.response.start":
                self.started = True
                if self._admission.capture:
                    self._send = _Recorder(self._admission, self._send)
        return self._send(message)


async def _drop() -> None:
    """Send nothing."""


class _Recorder:
    """Watches a reply leave, and settles the admission before its last byte does."""

    __slots__ = ("_admission", "_body", "_headers", "_send", "_status")

    def __init__(self, admission: Admission, send: Send) -> None:
        self._admission = admission
        self._send = send
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: bytearray | None = bytearray()

    async def __call__(self, message: Message) -> None:
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
