"""Floor 4: the inner stage. Asks for limits and keys where the caller is known: right before the router."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio.from_thread
from starlette.types import ASGIApp, Receive, Scope, Send

from http_middleware.body import Body, ClientGoneError
from http_middleware.call import rename_call
from http_middleware.recorder import Outgoing
from http_middleware.render import (
    refuse_websocket,
    render_client_gone,
    render_reject,
    render_reply,
)
from resilience import wire
from resilience.admission import Admission, Policy, Refused
from resilience.pipeline import Pipeline
from resilience.policies.idempotency import MAX_PAYLOAD, IdempotencyPolicy
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Verdict

ADMISSION = "resilience.admission"
OPERATION = "resilience.operation"
_CORE = "resilience.core"


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
        outgoing = Outgoing(admission, send)
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
