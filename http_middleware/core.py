"""Floor 4: the inner stage. Asks for limits and keys where the caller is known: right before the router."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio.from_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_middleware.body import ClientGoneError
from http_middleware.call import HttpCall
from http_middleware.recorder import Recorder
from http_middleware.render import (
    refuse_websocket,
    render_client_gone,
    render_reject,
    render_reply,
)
from resilience import wire
from resilience.admission import Admission, Policy, Refused
from resilience.pipeline import Pipeline
from resilience.policies.idempotency import IdempotencyPolicy
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Verdict

ADMISSION = "resilience.admission"


class CoreMiddleware:
    """The inner stage. Stands inside of authentication, and outside of the router and of error handlers.

    Args:
        app: the application inside.
        pipeline: whose core policies it asks. Each pipeline's are asked once for a request, however often they stand
            in its way.
    """

    def __init__(self, app: ASGIApp, pipeline: Pipeline) -> None:
        self.app = app
        self._groups: tuple[Sequence[Policy], ...] = (pipeline.core,)
        self._policies = tuple(pipeline.core)

    def join(self, pipeline: Pipeline) -> None:
        """Ask another pipeline's core policies, too: limits before keys, so that what is refused claims nothing."""
        if pipeline.core and all(group is not pipeline.core for group in self._groups):
            groups = [group for group in (*self._groups, pipeline.core) if group]
            self._groups = tuple(sorted(groups, key=_has_keys))
            self._policies = tuple(policy for group in self._groups for policy in group)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Ask the core policies on the admission that the edge opened."""
        admission: Admission | None = scope.get(ADMISSION)
        if admission is None:
            return self.app(scope, receive, send)
        call: HttpCall = admission.call  # type: ignore[assignment] # an edge has opened it
        if call.located or scope["type"] != "http":
            return self._serve_untold(call, admission, scope, receive, send)
        return self._serve(call, admission, scope, receive, send)

    async def _serve(self, call: HttpCall, admission: Admission, scope: Scope, receive: Receive, send: Send) -> None:
        _locate(call, admission, scope)
        call.receive = receive
        admission.asked += self._groups
        admission.from_thread = _from_thread
        outgoing = send

        def let_out(message: Message) -> Awaitable[None]:
            # No coroutine of its own: nothing is awaited here, and every message of every reply comes by.
            nonlocal outgoing
            if not call.answered:
                if admission.verdict is not PROCEED:
                    return _drop()
                if message["type"] == "http.response.start":
                    call.answered = True
                    if admission.capture:
                        outgoing = Recorder(admission, send)
            return outgoing(message)

        try:
            if not self._policies or await admission.admit(self._policies) is PROCEED:
                await self.app(scope, call.receiver(), let_out)
        except Exception as error:
            if not await _is_ours(error, call, admission, send):
                raise
        if admission.verdict is not PROCEED and not call.answered:
            await _render(admission.verdict, admission, send)

    async def _serve_untold(
        self, call: HttpCall, admission: Admission, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve a handshake, or a request that another of us, further out, lets answer and watches."""
        groups = [group for group in self._groups if all(asked is not group for asked in admission.asked)]
        if groups or not call.located:
            _locate(call, admission, scope)
            admission.asked += tuple(groups)
            try:
                verdict = await admission.admit([policy for group in groups for policy in group])
            except ClientGoneError:
                await render_client_gone(send)
                return
            if isinstance(verdict, Reject):
                await refuse(verdict, admission, scope, send)
                return
            if verdict is not PROCEED:
                await _render(verdict, admission, send)
                return
        await self.app(scope, receive, send)


def _locate(call: HttpCall, admission: Admission, scope: Scope) -> None:
    call.locate(scope)
    user = scope.get("user")
    if user is not None:
        _adopt(user, admission)


async def _is_ours(error: Exception, call: HttpCall, admission: Admission, send: Send) -> bool:
    """Tell whether ``error`` is no error, but the way of one of our policies out of a handler."""
    if isinstance(error, Refused):
        return True  # the verdict is the admission's
    # Before an error handler further out answers: who retries on its answer must find the key free.
    if admission.capture or isinstance(error, ClientGoneError):
        await admission.settle(Outcome("failed"))
    if isinstance(error, ClientGoneError):
        # A policy found no whole body.
        if not call.answered:
            call.answered = True
            await render_client_gone(send)
        return True
    return False


async def refuse(verdict: Verdict, admission: Admission, scope: Scope, send: Send) -> None:
    """Refuse a request or a handshake."""
    if scope["type"] != "websocket":
        await _render(verdict, admission, send)
    elif isinstance(verdict, Reject):
        await refuse_websocket(verdict, scope.get("extensions") or (), admission, send)


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


def _from_thread(admit: Callable[[], Awaitable[Verdict]]) -> Verdict:
    async def ask() -> Verdict:
        return await admit()

    return anyio.from_thread.run(ask)


async def _drop() -> None:
    """Send nothing: what a handler made of a refusal by one of its own policies, a mounted application's error page."""
