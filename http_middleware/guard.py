"""Floor 4: idempotency as a FastAPI dependency, for handlers that deal with the key themselves.

The guard asks the policy that door and decorators ask, on the same admission, from inside of the handler. So it comes
after authentication and validation, and a key that is held for the request already is not asked for again.
"""

import json
import logging
from asyncio import Lock
from functools import partial
from typing import Any, NamedTuple, NoReturn

from fastapi import HTTPException, Request
from fastapi.encoders import jsonable_encoder

from http_middleware.body import ClientGoneError
from http_middleware.core import ADMISSION
from resilience import wire
from resilience.admission import Admission, Refused
from resilience.decisions.idempotency import accept_key
from resilience.errors import ConfigurationError
from resilience.policies.idempotency import IdempotencyPolicy
from resilience.policies.waiting import OnTwin
from resilience.verdict import Outcome, Reject, Replay, Reply, Verdict
from resilience.wire import Reason

logger = logging.getLogger("resilience")

_GUARD = "resilience.guard"


class CheckResult(NamedTuple):
    """What ``check`` found.

    Args:
        is_duplicate: whether the operation has been done; if not, this request must do it.
        cached_response: the first reply's body: what its JSON says, or its text where it is none.
        cached_status_code: the first reply's status.
    """

    is_duplicate: bool
    cached_response: Any = None
    cached_status_code: int = 200


class IdempotencyGuard:
    """One request's hold on its idempotency key. Get it with ``Depends(get_idempotency_guard)``.

    A request without a key is never a duplicate, and nothing is kept for it; insist on one with
    ``Depends(require_idempotency_key)``. The same holds for methods without effects, as GET. What retries get is the
    very reply that left, headers left out; ``@idempotent`` replays those too.

    Args:
        admission: of the request.
    """

    def __init__(self, admission: Admission) -> None:
        self.operation: str | None = None
        """What ``start`` called the operation; for people, since the key belongs to the route."""
        self._admission = admission
        self._verdict: Verdict | None = None
        self._asking = Lock()

    async def check(self, *, in_progress: OnTwin | None = None) -> CheckResult:
        """Claim the key, in one step: of all requests with it, one is told to go on. Further calls change nothing.

        Args:
            in_progress: ``wait`` waits up to 30 seconds for a twin that runs, which is a duplicate's reply then; by
                default that is refused at once.

        Raises:
            Refused: the request must not run, because the first is still running, for example. The door answers.
        """
        verdict = await self._ask(in_progress)
        if isinstance(verdict, Replay):
            return CheckResult(True, _content(verdict.reply.body), verdict.reply.code)
        return CheckResult(False)

    async def start(self, operation: str) -> None:
        """Name the operation that begins, and claim the key where ``check`` was not called.

        Raises:
            Refused: as ``check`` does; and where nobody checked, a duplicate is answered by the door.
        """
        checked = self._verdict is not None
        self.operation = operation
        verdict = await self._ask()
        if isinstance(verdict, Replay) and not checked:
            _refuse(self._admission, verdict)

    async def complete(self, content: Any, status_code: int = 200) -> None:
        """Declare the operation done: from here on it never runs again, whatever becomes of the handler.

        Retries get the reply that leaves; where none does, because something fails after this, they get ``content``.
        Never raises: what is done would else be done again.

        Args:
            content: anything that FastAPI can turn into JSON.
            status_code: the status to go with it.
        """
        if not self._admission.claimed:
            return
        try:
            body = json.dumps(jsonable_encoder(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            data = body.encode()
        except Exception as error:
            # The name of its class only: its text may quote the content.
            logger.warning(
                "A completed operation's content is no JSON; it can't be shown again: %s", type(error).__name__
            )
            await self._admission.settle(Outcome("completed"))
            return
        headers = (("content-type", "application/json"), ("content-length", str(len(data))))
        self._admission.done = Reply("http", status_code, headers, data)

    async def fail(self, reason: str) -> None:
        """Free the key at once, so that a retry runs. After ``complete`` it changes nothing.

        Args:
            reason: for the reader of the code: it may hold anything, so it is neither sent, stored nor logged.
        """
        del reason
        if self._admission.claimed and self._admission.done is None:
            await self._admission.settle(Outcome("failed"))

    async def _ask(self, in_progress: OnTwin | None = None) -> Verdict:
        async with self._asking:
            if self._verdict is None:
                self._verdict = await self._admit(in_progress)
        if isinstance(self._verdict, Reject):
            _refuse(self._admission, self._verdict)
        return self._verdict

    async def _admit(self, in_progress: OnTwin | None) -> Verdict:
        admission = self._admission
        policy = admission.late(("guard", in_progress), partial(IdempotencyPolicy, in_progress=in_progress))
        try:
            return await policy.admit(admission.call, admission)
        except ClientGoneError:
            raise HTTPException(400, "The request ended early") from None


async def get_idempotency_guard(request: Request) -> IdempotencyGuard:
    """Return the guard of a request, one for all who depend on it.

    Raises:
        ConfigurationError: no door of ours stands in front of the application.
    """
    admission = _admission(request, "get_idempotency_guard")
    guard = request.scope.get(_GUARD)
    if not isinstance(guard, IdempotencyGuard):
        guard = request.scope[_GUARD] = IdempotencyGuard(admission)
    return guard


async def require_idempotency_key(request: Request) -> str:
    """Return the request's idempotency key, without quotes. Claims nothing.

    Raises:
        Refused: there is none, or it is malformed; the door answers 400.
        ConfigurationError: no door of ours stands in front of the application.
    """
    admission = _admission(request, "require_idempotency_key")
    sent = admission.call.metadata.get_all(wire.IDEMPOTENCY_KEY)
    key = accept_key(sent)
    if not sent:
        _refuse(admission, Reject(Reason.IDEMPOTENCY_KEY_MISSING, "This operation needs an Idempotency-Key"))
    if key is None:
        message = "Send one Idempotency-Key of 1 to 255 visible ASCII characters, without quotes or backslashes inside"
        _refuse(admission, Reject(Reason.IDEMPOTENCY_KEY_MALFORMED, message))
    return key


def _admission(request: Request, dependency: str) -> Admission:
    admission: Admission | None = request.scope.get(ADMISSION)
    if admission is None or admission.from_thread is None:  # without a core, nobody would answer for a refusal
        raise ConfigurationError(
            f"{dependency} needs a door in front of the application: call install(app, pipeline) before it serves."
        )
    return admission


def _refuse(admission: Admission, verdict: Verdict) -> NoReturn:
    admission.verdict = verdict
    raise Refused(verdict)


def _content(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace") or None


def _no_json(constant: str) -> NoReturn:
    raise ValueError(constant)
